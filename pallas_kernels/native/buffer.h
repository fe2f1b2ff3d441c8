// Memory a thread keeps from one call to the next, so that no call pays for fresh pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace realm {

// At least `bytes`, aligned to a cache line, valid until the same object is asked again. Make it thread_local.
class Buffer {
 public:
  ~Buffer() { std::free(data_); }

  uint8_t* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, size_));
      if (data_ == nullptr) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Carves arrays out of one buffer: first counted, then handed out.
class Carver {
 public:
  explicit Carver(uint8_t* base) : next_(base) {}

  template <class T>
  T* take(size_t count) {
    T* out = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return out;
  }
  template <class T>
  static size_t bytes(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  uint8_t* next_;
};

}  // namespace realm
