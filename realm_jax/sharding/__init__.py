"""Several devices: meshes, the rules from logical axes to mesh axes, and jobs of several processes."""
