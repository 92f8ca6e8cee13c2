// Convolutions for narrow nets on one CPU core, called from compiled JAX programs by XLA's foreign function interface.
//
// Images are NHWC, kernels HWIO: so what a row of taps sees, a few pixels of C channels each, lies contiguous in memory,
// and so does that row of the kernel. One loop over such a window, a pixel's value times a vector of outputs, is all
// there is to a convolution. Its accumulators stay in registers. Everything is summed in an order that only the shapes set.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Int = std::int64_t;

#if defined(__AVX512F__)  // 32 registers
constexpr int kBytes = 64, kWide = 8;
#elif defined(__ARM_NEON)
constexpr int kBytes = 16, kWide = 8;
#else  // 16 registers
constexpr int kBytes = 32, kWide = 4;
#endif

template <typename T>
constexpr int kLanes = kBytes / sizeof(T);

template <typename T>
struct Unaligned {
  typedef T Vector __attribute__((vector_size(kBytes), aligned(4), may_alias));
};
template <typename T>
using Vector = typename Unaligned<T>::Vector;

Int RoundUp(Int n, Int to) { return (n + to - 1) / to * to; }

// Memory of the calling thread that outlives a call: fresh pages would cost as much as the convolution.
template <typename T>
T* Scratch(int slot, Int count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> held[3];
  thread_local Int sizes[3] = {};
  Int bytes = RoundUp(count * sizeof(T), 4096);
  if (bytes > sizes[slot]) {
    held[slot].reset(std::aligned_alloc(4096, bytes));
    sizes[slot] = bytes;
  }
  return static_cast<T*>(held[slot].get());
}

// ---- The loop: blocks of R rows x P pixels x N vectors of outputs ----

// What is read, [rows][pixels], and what is written. Steps are in elements.
struct Plane {
  Int rows, cols;                     // of outputs
  Int pixel_step, row_step, pitch;    // from an output to the next one, down, and from a tap's row to the next one
  Int taps, window;                   // rows of taps, and values in one of them
  Int out_pixel_step, out_row_step;
};

template <typename T, int PixelStep, int R, int P, int N>
inline void Block(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  const Int step = PixelStep ? PixelStep : g.pixel_step;  // known beforehand: one address register for all pixels
  Vector<T> sum[R][P][N] = {};
  for (Int i = 0; i < g.taps; ++i, x += g.pitch) {
    const T* at = x;
#pragma GCC unroll 2
    for (Int q = 0; q < g.window; ++q, ++at, kernel += N * kLanes<T>) {
      Vector<T> k[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) k[n] = *reinterpret_cast<const Vector<T>*>(kernel + n * kLanes<T>);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const T value = at[r * g.row_step + p * step];
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) sum[r][p][n] += value * k[n];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        T* to = y + r * g.out_row_step + p * g.out_pixel_step + n * kLanes<T>;
        const Int rest = lanes - n * kLanes<T>;
        if (rest >= kLanes<T>) {
          *reinterpret_cast<Vector<T>*>(to) = sum[r][p][n];
        } else {
          std::memcpy(to, &sum[r][p][n], rest * sizeof(T));
        }
      }
    }
  }
}

// All outputs of a plane; the last blocks overlap their neighbours, which writes the same values twice.
template <typename T, int PixelStep, int R, int P, int N>
void Blocks(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  for (Int row = 0; row < g.rows; row += R) {
    const Int r = std::min(row, g.rows - R);
    for (Int col = 0; col < g.cols; col += P) {
      const Int c = std::min(col, g.cols - P);
      Block<T, PixelStep, R, P, N>(g, x + r * g.row_step + c * g.pixel_step, kernel,
                                   y + r * g.out_row_step + c * g.out_pixel_step, lanes);
    }
  }
}

template <typename T, int PixelStep>
void Outputs(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  constexpr int kHalf = kWide / 2, kBoth = 2 * kLanes<T>;
  for (; lanes > kLanes<T>; lanes -= kBoth, y += kBoth, kernel += kBoth * g.taps * g.window) {
    if (g.cols >= kWide) {
      Blocks<T, PixelStep, 1, kWide, 2>(g, x, kernel, y, lanes);
    } else if (g.cols >= kHalf && g.rows >= 2) {
      Blocks<T, PixelStep, 2, kHalf, 2>(g, x, kernel, y, lanes);
    } else {
      Blocks<T, PixelStep, 1, 1, 2>(g, x, kernel, y, lanes);
    }
  }
  if (lanes <= 0) return;
  if (g.cols >= kWide && g.rows >= 2) {
    Blocks<T, PixelStep, 2, kWide, 1>(g, x, kernel, y, lanes);
  } else if (g.cols >= kHalf && g.rows >= 4) {
    Blocks<T, PixelStep, 4, kHalf, 1>(g, x, kernel, y, lanes);
  } else {
    Blocks<T, PixelStep, 1, 1, 1>(g, x, kernel, y, lanes);
  }
}

template <typename T>
void Run(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  if constexpr (sizeof(T) == 4) {
    switch (g.pixel_step) {
      case 16: return Outputs<T, 16>(g, x, kernel, y, lanes);
      case 32: return Outputs<T, 32>(g, x, kernel, y, lanes);
      case 64: return Outputs<T, 64>(g, x, kernel, y, lanes);
      case 128: return Outputs<T, 128>(g, x, kernel, y, lanes);
    }
  }
  Outputs<T, 0>(g, x, kernel, y, lanes);
}

// ---- Images, and the kernel in the order in which the loop reads it ----

struct Images {
  Int count, height, width, channels;
  Int size() const { return height * width * channels; }
};

Images Shape(ffi::AnyBuffer buffer) {
  auto d = buffer.dimensions();
  return {d[0], d[1], d[2], d[3]};
}

// Images with a border of zeros, `low` pixels before and `high` behind, which is written only once, and some room behind
// the last one. Without any of these they stay where they are.
template <typename T>
class Bordered {
 public:
  Bordered(const Images& in, Int low, Int high, Int group, Int room = 0) : in_(in), low_(low) {
    out = {group, in.height + low + high, in.width + low + high, in.channels};
    if (low + high + room == 0) return;
    data_ = Scratch<T>(0, group * out.size() + room);
    std::memset(data_, 0, (group * out.size() + room) * sizeof(T));
  }
  const T* Fill(const T* images, Int count) {
    if (!data_) return images;
    const Int row = in_.width * in_.channels;
    for (Int n = 0; n < count; ++n) {
      for (Int h = 0; h < in_.height; ++h) {
        T* to = data_ + n * out.size() + ((h + low_) * out.width + low_) * in_.channels;
        std::memcpy(to, images + n * in_.size() + h * row, row * sizeof(T));
      }
    }
    return data_;
  }
  Images out;

 private:
  Images in_;
  Int low_;
  T* data_ = nullptr;
};

// A convolution of bordered images with part of a kernel, to part of the output's pixels.
struct Part {
  Int rows, columns;        // of taps
  Int out_row, out_column;  // of the first output pixel
  Int out_stride;
};

// Few outputs leave most of a vector's lanes empty. Then two neighbouring pixels share it, although each must step over
// the other's taps.
template <typename T>
bool Paired(Int outputs, Int cols) {
  return 2 * outputs <= kLanes<T> && cols % 2 == 0;
}

template <typename T>
class Convolution {
 public:
  // at(i, j, c, o): the part's own kernel.
  template <typename Kernel>
  Convolution(const Images& from, const Images& to, Int stride, const Part& part, Kernel at, T*& free)
      : kernel_(free), start_((part.out_row * to.width + part.out_column) * to.channels) {
    const Int c = from.channels, o = to.channels, rows = (to.height - part.out_row + part.out_stride - 1) / part.out_stride;
    const Int cols = (to.width - part.out_column + part.out_stride - 1) / part.out_stride;
    const Int pair = part.out_stride == 1 && Paired<T>(o, cols) ? 2 : 1;
    const Int columns = part.columns + (pair - 1) * stride, pitch = from.width * c;
    lanes_ = pair * o;
    plane_ = {rows, cols / pair, pair * stride * c, stride * pitch, pitch, part.rows, columns * c,
              part.out_stride * lanes_, part.out_stride * to.width * o};
    for (Int first = 0; first < lanes_; first += 2 * kLanes<T>) {
      const Int width = lanes_ - first > kLanes<T> ? 2 * kLanes<T> : kLanes<T>;
      for (Int i = 0; i < part.rows; ++i) {
        for (Int j = 0; j < columns; ++j) {
          for (Int k = 0; k < c; ++k, free += width) {
            std::fill(free, free + width, T(0));
            for (Int half = 0; half < pair; ++half) {
              const Int own = j - half * stride;
              if (own < 0 || own >= part.columns) continue;
              for (Int n = 0; n < std::min(o - first, width); ++n) free[half * o + n] = at(i, own, k, first + n);
            }
          }
        }
      }
    }
  }
  void operator()(const T* x, T* y) const { Run<T>(plane_, x, kernel_, y + start_, lanes_); }

  static T* Room(const Images& from, const Images& to, Int taps, Int stride) {
    return Scratch<T>(1, taps * (taps + stride) * from.channels * RoundUp(to.channels, kLanes<T>));
  }

 private:
  const T* kernel_;
  Int start_, lanes_;
  Plane plane_;
};

template <typename T>
void Forward(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* images, const T* kernel, T* out) {
  const Int c = x.channels, o = y.channels;
  Bordered<T> bordered(x, pad, pad, 1);
  T* room = Convolution<T>::Room(x, y, taps, stride);
  Convolution<T> run(bordered.out, y, stride, {taps, taps, 0, 0, 1},
                     [=](Int i, Int j, Int k, Int l) { return kernel[((i * taps + j) * c + k) * o + l]; }, room);
  for (Int n = 0; n < x.count; ++n) run(bordered.Fill(images + n * x.size(), 1), out + n * y.size());
}

// x[s a + b] gets, from each tap i with (b + pad - i) divisible by the stride s, gradient[a + (b + pad - i) / s]: so
// the pixels with equal b are a convolution of their own, with every s-th tap, turned round.
template <typename T>
void ImageGradient(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* gradient, const T* kernel,
                   T* out) {
  const Int c = x.channels, o = y.channels;
  Bordered<T> bordered(y, stride == 1 ? taps - 1 - pad : 0, taps - 1 - pad, 1);
  T* room = Convolution<T>::Room(y, x, taps, stride);
  std::vector<Convolution<T>> parts;
  // The tap that such a pixel's window begins with, and how many there are.
  const auto last = [=](Int b) { return stride == 1 ? taps - 1 : b + pad; };
  const auto count = [=](Int b) { return last(b) / stride + 1; };
  for (Int b = 0; b < std::min(stride, x.height); ++b) {
    for (Int d = 0; d < std::min(stride, x.width); ++d) {
      if (last(b) >= taps || last(d) >= taps) continue;  // a 1x1 kernel does not see these
      const auto at = [=](Int i, Int j, Int k, Int l) {
        return kernel[(((last(b) - i * stride) * taps + last(d) - j * stride) * c + l) * o + k];
      };
      parts.emplace_back(bordered.out, x, 1, Part{count(b), count(d), b, d, stride}, at, room);
    }
  }
  if (static_cast<Int>(parts.size()) < std::min(stride, x.height) * std::min(stride, x.width)) {
    std::memset(out, 0, x.count * x.size() * sizeof(T));
  }
  for (Int n = 0; n < x.count; ++n) {
    const T* from = bordered.Fill(gradient + n * y.size(), 1);
    for (const auto& part : parts) part(from, out + n * x.size());
  }
}

// ---- The gradient of the kernel ----

// Adds to sums[Q][lanes] what Q values of the window and N vectors of the gradient give, over `images` x `rows` x `cols`.
template <typename T, int Q, int N>
void Correlate(const Plane& g, Int images, Int image_step, Int out_image_step, const T* x, const T* gradient, T* sums,
               Int lanes) {
  Vector<T> sum[Q][N] = {};
  for (Int image = 0; image < images; ++image) {
    for (Int row = 0; row < g.rows; ++row) {
      const T* at = x + image * image_step + row * g.row_step;
      const T* from = gradient + image * out_image_step + row * g.out_row_step;
      for (Int col = 0; col < g.cols; ++col, at += g.pixel_step, from += g.out_pixel_step) {
        Vector<T> v[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) v[n] = *reinterpret_cast<const Vector<T>*>(from + n * kLanes<T>);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) sum[q][n] += at[q] * v[n];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) *reinterpret_cast<Vector<T>*>(sums + q * lanes + n * kLanes<T>) += sum[q][n];
  }
}

template <typename T>
void KernelGradient(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* images, const T* gradient,
                    T* out) {
  constexpr Int kPixels = 64, kAtMost = 256;  // summed in registers: enough to pay for the loop, few enough for the L1 cache
  constexpr int kQ = 2 * kWide;
  const Int c = x.channels, o = y.channels, pair = Paired<T>(o, y.width) ? 2 : 1, cols = y.width / pair;
  const Int columns = taps + (pair - 1) * stride, used = pair * o, lanes = RoundUp(used, kLanes<T>);
  const Int group = std::min(x.count, std::max<Int>(1, kPixels / (y.height * cols)));
  const Int rows = std::max<Int>(1, kAtMost / (group * cols)), window = RoundUp(columns * c, kQ);
  Bordered<T> bordered(x, pad, pad, group, window - columns * c);
  const Int pitch = bordered.out.width * c;
  // Vectors that stick out of the array are read from a copy with room behind it.
  const bool copy_gradient = used != lanes;
  T* gradient_copy = copy_gradient ? Scratch<T>(1, group * y.size() + lanes) : nullptr;
  if (copy_gradient) std::memset(gradient_copy, 0, (group * y.size() + lanes) * sizeof(T));
  T* sums = Scratch<T>(2, taps * window * lanes);
  std::memset(sums, 0, taps * window * lanes * sizeof(T));
  for (Int first = 0; first < x.count; first += group) {
    const Int count = std::min(group, x.count - first);
    const T* from = bordered.Fill(images + first * x.size(), count);
    const T* to = gradient + first * y.size();
    if (copy_gradient) to = static_cast<T*>(std::memcpy(gradient_copy, to, count * y.size() * sizeof(T)));
    for (Int row = 0; row < y.height; row += rows) {
      const Plane g{std::min(rows, y.height - row), cols, pair * stride * c, stride * pitch, pitch, taps, window, used, y.width * o};
      for (Int i = 0; i < taps; ++i) {
        const T* at = from + row * g.row_step + i * pitch;
        const T* of = to + row * g.out_row_step;
        T* into = sums + i * window * lanes;
        Int l = 0;
        for (; l + kLanes<T> < lanes; l += 2 * kLanes<T>) {
          for (Int q = 0; q < columns * c; q += kWide) {
            Correlate<T, kWide, 2>(g, count, bordered.out.size(), y.size(), at + q, of + l, into + q * lanes + l, lanes);
          }
        }
        for (Int q = 0; l < lanes && q < columns * c; q += kQ) {
          Correlate<T, kQ, 1>(g, count, bordered.out.size(), y.size(), at + q, of + l, into + q * lanes + l, lanes);
        }
      }
    }
  }
  for (Int i = 0; i < taps; ++i) {
    for (Int q = 0; q < taps * c; ++q) {
      const T* one = sums + (i * window + q) * lanes;
      for (Int l = 0; l < o; ++l) {
        out[(i * taps * c + q) * o + l] = one[l] + (pair == 2 ? one[stride * c * lanes + o + l] : T(0));
      }
    }
  }
}

enum Operation { kForward, kImageGradient, kKernelGradient };

template <typename T>
void Compute(Operation operation, const Images& x, const Images& y, Int taps, Int stride, Int pad, ffi::AnyBuffer a,
             ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> result) {
  const T *first = static_cast<const T*>(a.untyped_data()), *second = static_cast<const T*>(b.untyped_data());
  T* out = static_cast<T*>(result->untyped_data());
  switch (operation) {
    case kForward: return Forward<T>(x, y, taps, stride, pad, first, second, out);
    case kImageGradient: return ImageGradient<T>(x, y, taps, stride, pad, first, second, out);
    case kKernelGradient: return KernelGradient<T>(x, y, taps, stride, pad, first, second, out);
  }
}

template <Operation operation>
ffi::Error Call(ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> out, Int stride, Int pad) {
  const Images x = Shape(operation == kImageGradient ? *out : a);
  const Images y = Shape(operation == kForward ? *out : operation == kImageGradient ? a : b);
  const Int taps = (operation == kKernelGradient ? *out : b).dimensions()[0];
  if (a.element_type() == ffi::DataType::F32) {
    Compute<float>(operation, x, y, taps, stride, pad, a, b, out);
  } else if (a.element_type() == ffi::DataType::F64) {
    Compute<double>(operation, x, y, taps, stride, pad, a, b, out);
  } else {
    return ffi::Error::InvalidArgument("the native convolution takes float32 and float64.");
  }
  return ffi::Error::Success();
}

}  // namespace

// (images, kernel) -> output; (output's gradient, kernel) -> images' gradient; (images, output's gradient) -> kernel's.
#define HANDLER(name, operation)                                                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, Call<operation>,                                                        \
                                ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()                  \
                                    .Ret<ffi::AnyBuffer>().Attr<Int>("stride").Attr<Int>("pad"))
HANDLER(forward, kForward);
HANDLER(image_gradient, kImageGradient);
HANDLER(kernel_gradient, kKernelGradient);
