"""stub while writing"""
