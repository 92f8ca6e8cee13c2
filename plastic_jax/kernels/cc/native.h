// What the native operations share: vectors, memory that a thread keeps, and operands as XLA hands them over.
#ifndef PLASTIC_JAX_NATIVE_H_
#define PLASTIC_JAX_NATIVE_H_

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "xla/ffi/api/ffi.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace ffi = xla::ffi;

namespace {

using Int = std::int64_t;

// kWide pixels of two vectors of outputs, or 2 x kWide of one, are summed in registers at a time.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kWide = 8;  // of 32 registers
#elif defined(__AVX__)
constexpr int kBytes = 32, kWide = 4;  // of 16
#else
constexpr int kBytes = 16, kWide = 4;
#endif
constexpr int kHalf = kWide / 2;

template <typename T>
constexpr Int kLanes = kBytes / sizeof(T);

template <typename T>
struct Unaligned {
  typedef T Vector __attribute__((vector_size(kBytes), aligned(4), may_alias));
};
template <typename T>
using Vector = typename Unaligned<T>::Vector;

template <typename T>
Vector<T>& At(const T* p) { return *reinterpret_cast<Vector<T>*>(const_cast<T*>(p)); }

Int RoundUp(Int n, Int to) { return (n + to - 1) / to * to; }

// Memory that the thread keeps for its next call: fresh pages cost as much as a small convolution.
enum Use { kImages, kGradient, kBorder, kKernel, kSums, kPanel, kUses };

template <typename T>
T* Scratch(Use use, Int count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> held[kUses];
  thread_local Int sizes[kUses] = {};
  const Int bytes = RoundUp(count * sizeof(T), 4096);
  if (bytes > sizes[use]) {
    held[use].reset(std::aligned_alloc(4096, bytes));
    if (!held[use]) throw std::bad_alloc();
    sizes[use] = bytes;
  }
  return static_cast<T*>(held[use].get());
}

// An operand or result with no values is none.
template <typename T>
T* Data(ffi::AnyBuffer buffer) { return buffer.element_count() ? static_cast<T*>(buffer.untyped_data()) : nullptr; }

template <typename F>
ffi::Error Typed(ffi::DataType type, const F& run) {
  if (type == ffi::DataType::F32) return run(float()), ffi::Error::Success();
  if (type == ffi::DataType::F64) return run(double()), ffi::Error::Success();
  return ffi::Error::InvalidArgument("the native operations take float32 and float64.");
}

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

}  // namespace

#endif
