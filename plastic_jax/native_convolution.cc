// Convolutions for narrow nets on one CPU core, called from compiled JAX programs by XLA's foreign function interface.
//
// Images are NHWC and kernels HWIO, so what a row of taps sees, a few pixels of C channels each, lies contiguous in
// memory, and so does that row of the kernel. A loop over such a window, a value of it times a vector of outputs, with
// the sums of 16 vectors in registers, is all there is to a convolution. The shapes alone set the order of summation.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

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
enum Use { kImages, kGradient, kKernel, kUses };

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
    sizes[use] = bytes;
  }
  return static_cast<T*>(held[use].get());
}

struct Images {
  Int count, height, width, channels;
  Int size() const { return height * width * channels; }
};

// Images with a border of zeros, `low` pixels before and `high` behind, and room behind the last one for vectors that
// stick out; without any of these they stay where they are. The border is written once and serves all images in turn.
template <typename T>
struct Bordered {
  Bordered(const Images& in, Int low, Int high, Int group, Int room, Use use) : in(in), low(low) {
    out = {group, in.height + low + high, in.width + low + high, in.channels};
    if (low + high + room == 0) return;
    data = Scratch<T>(use, group * out.size() + room);
    std::memset(data, 0, (group * out.size() + room) * sizeof(T));
  }
  const T* Fill(const T* images, Int count) const {
    if (!data) return images;
    const Int row = in.width * in.channels;
    for (Int n = 0; n < count * in.height; ++n, images += row) {
      const Int image = n / in.height, h = n % in.height;
      T* to = data + image * out.size() + ((h + low) * out.width + low) * in.channels;
      std::memcpy(to, images, row * sizeof(T));
    }
    return data;
  }
  Images in, out;
  Int low;
  T* data = nullptr;
};

// What a loop runs over, in steps of elements: from a pixel to the next, right and down; from one row of taps to the
// next, each a window of so many contiguous values.
struct Plane {
  Int rows, cols, step, row_step, taps, pitch, window, out_step, out_row_step;
};

// R x P outputs of N vectors each, of which only so many lanes are written.
template <typename T, int Step, int R, int P, int N>
inline void Block(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  const Int step = Step ? Step : g.step;  // known beforehand, one address register serves a row of pixels
  Vector<T> sum[R][P][N] = {};
  for (Int i = 0; i < g.taps; ++i, x += g.pitch) {
    for (Int q = 0; q < g.window; ++q, kernel += N * kLanes<T>) {
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int p = 0; p < P; ++p) {
          const T value = x[q + r * g.row_step + p * step];
          UNROLL for (int n = 0; n < N; ++n) sum[r][p][n] += value * At(kernel + n * kLanes<T>);
        }
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int p = 0; p < P; ++p) {
      UNROLL for (int n = 0; n < N; ++n) {
        T* to = y + r * g.out_row_step + p * g.out_step + n * kLanes<T>;
        const Int rest = lanes - n * kLanes<T>;
        if (rest >= kLanes<T>) {
          At(to) = sum[r][p][n];
        } else {
          std::memcpy(to, &sum[r][p][n], rest * sizeof(T));
        }
      }
    }
  }
}

// All of a plane. The last blocks overlap their neighbours and write the same values twice.
template <typename T, int Step, int R, int P, int N>
void Blocks(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  for (Int row = 0; row < g.rows; row += R) {
    for (Int col = 0; col < g.cols; col += P) {
      const Int r = std::min(row, g.rows - R), c = std::min(col, g.cols - P);
      const T* from = x + r * g.row_step + c * g.step;
      Block<T, Step, R, P, N>(g, from, kernel, y + r * g.out_row_step + c * g.out_step, lanes);
    }
  }
}

template <typename T, int Step>
void Outputs(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  constexpr Int kTwo = 2 * kLanes<T>;
  for (; lanes > kLanes<T>; lanes -= kTwo, y += kTwo, kernel += kTwo * g.taps * g.window) {
    const auto run = g.cols >= kWide                  ? Blocks<T, Step, 1, kWide, 2>
                     : g.cols >= kHalf && g.rows >= 2 ? Blocks<T, Step, 2, kHalf, 2>
                                                      : Blocks<T, Step, 1, 1, 2>;
    run(g, x, kernel, y, lanes);
  }
  if (lanes <= 0) return;
  const auto run = g.cols >= kWide && g.rows >= 2   ? Blocks<T, Step, 2, kWide, 1>
                   : g.cols >= kHalf && g.rows >= 4 ? Blocks<T, Step, 4, kHalf, 1>
                                                    : Blocks<T, Step, 1, 1, 1>;
  run(g, x, kernel, y, lanes);
}

// The usual widths, in float32, have loops of their own.
template <typename T>
void Run(const Plane& g, const T* x, const T* kernel, T* y, Int lanes) {
  const Int step = sizeof(T) == sizeof(float) ? g.step : 0;
  const auto run = step == 16    ? Outputs<T, sizeof(T) == 4 ? 16 : 0>
                   : step == 32  ? Outputs<T, sizeof(T) == 4 ? 32 : 0>
                   : step == 64  ? Outputs<T, sizeof(T) == 4 ? 64 : 0>
                   : step == 128 ? Outputs<T, sizeof(T) == 4 ? 128 : 0>
                                 : Outputs<T, 0>;
  run(g, x, kernel, y, lanes);
}

// Few outputs leave most of a vector's lanes empty. Then two neighbouring pixels share it, although the window must be
// as wide as to serve both.
template <typename T>
Int Sharing(Int outputs, Int cols) { return 2 * outputs <= kLanes<T> && cols % 2 == 0 ? 2 : 1; }

// A convolution of bordered images with `rows` x `columns` taps, to every `apart`-th pixel of the output.
template <typename T>
struct Convolution {
  // at(i, j, c, o): the kernel; free: where to keep it, in the order in which it is read. It is moved on.
  template <typename Kernel>
  Convolution(const Images& x, const Images& y, Int stride, Int rows, Int columns, Int row, Int column, Int apart,
              Kernel at, T*& free)
      : kernel(free), start((row * y.width + column) * y.channels) {
    const Int c = x.channels, o = y.channels, pitch = x.width * c, cols = (y.width - column + apart - 1) / apart;
    const Int sharing = apart == 1 ? Sharing<T>(o, cols) : 1, wide = columns + (sharing - 1) * stride;
    lanes = sharing * o;
    plane = {(y.height - row + apart - 1) / apart, cols / sharing, sharing * stride * c, stride * pitch, rows, pitch,
             wide * c, apart * lanes, apart * y.width * o};
    for (Int first = 0, width; first < lanes; first += width) {
      width = lanes - first > kLanes<T> ? 2 * kLanes<T> : kLanes<T>;
      for (Int tap = 0; tap < rows * wide; ++tap) {
        for (Int k = 0; k < c; ++k, free += width) {
          std::fill(free, free + width, T(0));
          for (Int own = tap % wide, s = 0; s < sharing && own >= 0; ++s, own -= stride) {
            if (own >= columns) continue;
            for (Int n = 0; n < std::min(o - first, width); ++n) free[s * o + n] = at(tap / wide, own, k, first + n);
          }
        }
      }
    }
  }
  static T* Room(const Images& x, const Images& y, Int taps, Int stride) {
    return Scratch<T>(kKernel, taps * (taps + stride) * x.channels * RoundUp(y.channels, kLanes<T>));
  }
  void operator()(const T* x, T* y) const { Run<T>(plane, x, kernel, y + start, lanes); }
  const T* kernel;
  Int start, lanes;
  Plane plane;
};

template <typename T>
void Forward(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* images, const T* kernel,
             T* out) {
  const Bordered<T> bordered(x, pad, pad, 1, 0, kImages);
  T* room = Convolution<T>::Room(x, y, taps, stride);
  const auto at = [&](Int i, Int j, Int c, Int o) {
    return kernel[((i * taps + j) * x.channels + c) * y.channels + o];
  };
  const Convolution<T> run(bordered.out, y, stride, taps, taps, 0, 0, 1, at, room);
  for (Int n = 0; n < x.count; ++n) run(bordered.Fill(images + n * x.size(), 1), out + n * y.size());
}

// Pixel stride * a + b gets gradient[a + (b + pad - i) / stride] from every tap i for which that is a whole number. So
// the pixels with equal b are a convolution of the gradient, with every stride-th tap, turned round: no zeros between.
template <typename T>
void ImageGradient(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* gradient, const T* kernel,
                   T* out) {
  const Int behind = taps - 1 - pad;
  const Bordered<T> bordered(y, stride == 1 ? behind : 0, behind, 1, 0, kImages);
  T* room = Convolution<T>::Room(y, x, taps, stride);
  std::vector<Convolution<T>> parts;
  for (Int b = 0; b < stride; ++b) {
    for (Int d = 0; d < stride; ++d) {
      const Int last = stride == 1 ? behind + pad : b + pad, last_column = stride == 1 ? last : d + pad;
      if (last >= taps || last_column >= taps || b >= x.height || d >= x.width) continue;
      const auto at = [=](Int i, Int j, Int k, Int l) {
        return kernel[(((last - i * stride) * taps + last_column - j * stride) * x.channels + l) * y.channels + k];
      };
      parts.emplace_back(bordered.out, x, 1, last / stride + 1, last_column / stride + 1, b, d, stride, at, room);
    }
  }
  if (taps < stride) std::memset(out, 0, x.count * x.size() * sizeof(T));  // pixels that the kernel does not see
  for (Int n = 0; n < x.count; ++n) {
    const T* from = bordered.Fill(gradient + n * y.size(), 1);
    for (const auto& part : parts) part(from, out + n * x.size());
  }
}

// Adds Q values of the window times N vectors of the gradient, summed over the images' planes, to sums[Q][lanes].
template <typename T, int Q, int N>
void Correlate(const Plane& g, const Images& x, const Images& y, const T* image, const T* gradient, T* sums,
               Int lanes) {
  Vector<T> sum[Q][N] = {};
  for (Int n = 0; n < x.count; ++n, image += x.size(), gradient += y.size()) {
    for (Int row = 0; row < g.rows; ++row) {
      const T *at = image + row * g.row_step, *from = gradient + row * g.out_row_step;
      for (Int col = 0; col < g.cols; ++col, at += g.step, from += g.out_step) {
        UNROLL for (int q = 0; q < Q; ++q) {
          UNROLL for (int v = 0; v < N; ++v) sum[q][v] += at[q] * At(from + v * kLanes<T>);
        }
      }
    }
  }
  UNROLL for (int q = 0; q < Q; ++q) {
    UNROLL for (int v = 0; v < N; ++v) At(sums + q * lanes + v * kLanes<T>) += sum[q][v];
  }
}

template <typename T>
void KernelGradient(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* images, const T* gradient,
                    T* out) {
  constexpr Int kLeast = 64, kMost = 256;  // pixels a loop: enough to pay for its ends, few enough for the L1 cache
  constexpr int kQ = 2 * kWide;
  const Int c = x.channels, o = y.channels, sharing = Sharing<T>(o, y.width), cols = y.width / sharing;
  const Int values = (taps + (sharing - 1) * stride) * c, window = RoundUp(values, kQ);
  const Int used = sharing * o, lanes = RoundUp(used, kLanes<T>);
  const Int group = std::min(x.count, std::max<Int>(1, kLeast / (y.height * cols)));
  const Int rows = std::max<Int>(1, kMost / (group * cols));
  // What the vectors find where they stick out of the window, or of the outputs, is not used.
  const Bordered<T> bordered(x, pad, pad, group, window - values, kImages);
  const Bordered<T> flat(y, 0, 0, group, lanes - used, kGradient);
  const Int pitch = bordered.out.width * c;
  T* sums = Scratch<T>(kKernel, taps * window * lanes);
  std::memset(sums, 0, taps * window * lanes * sizeof(T));
  for (Int first = 0; first < x.count; first += group) {
    Images some = bordered.out;
    some.count = std::min(group, x.count - first);
    const T* from = bordered.Fill(images + first * x.size(), some.count);
    const T* to = flat.Fill(gradient + first * y.size(), some.count);
    for (Int row = 0; row < y.height; row += rows) {
      const Int step = sharing * stride * c, some_rows = std::min(rows, y.height - row);
      const Plane g{some_rows, cols, step, stride * pitch, taps, pitch, window, used, y.width * o};
      for (Int i = 0; i < taps; ++i) {
        const T *at = from + row * g.row_step + i * pitch, *of = to + row * g.out_row_step;
        T* into = sums + i * window * lanes;
        Int l = 0;
        for (; l + kLanes<T> < lanes; l += 2 * kLanes<T>) {
          for (Int q = 0; q < values; q += kWide) {
            Correlate<T, kWide, 2>(g, some, y, at + q, of + l, into + q * lanes + l, lanes);
          }
        }
        for (Int q = 0; l < lanes && q < values; q += kQ) {
          Correlate<T, kQ, 1>(g, some, y, at + q, of + l, into + q * lanes + l, lanes);
        }
      }
    }
  }
  for (Int n = 0; n < taps * taps * c; ++n, out += o) {
    const T* one = sums + (n / (taps * c) * window + n % (taps * c)) * lanes;
    for (Int l = 0; l < o; ++l) out[l] = sharing == 1 ? one[l] : one[l] + one[stride * c * lanes + o + l];
  }
}

enum Operation { kForward, kImageGradient, kKernelGradient };

template <typename T, Operation operation>
ffi::Error Compute(ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> result, Int stride, Int pad) {
  const auto shape = [](ffi::AnyBuffer buffer) {
    const auto sizes = buffer.dimensions();
    return Images{sizes[0], sizes[1], sizes[2], sizes[3]};
  };
  const Images x = shape(operation == kImageGradient ? *result : a);
  const Images y = shape(operation == kForward ? *result : operation == kImageGradient ? a : b);
  const Int taps = (operation == kKernelGradient ? *result : b).dimensions()[0];
  const auto run = operation == kForward         ? Forward<T>
                   : operation == kImageGradient ? ImageGradient<T>
                                                 : KernelGradient<T>;
  run(x, y, taps, stride, pad, static_cast<const T*>(a.untyped_data()), static_cast<const T*>(b.untyped_data()),
      static_cast<T*>(result->untyped_data()));
  return ffi::Error::Success();
}

template <Operation operation>
ffi::Error Call(ffi::AnyBuffer a, ffi::AnyBuffer b, ffi::Result<ffi::AnyBuffer> result, Int stride, Int pad) {
  if (a.element_type() == ffi::DataType::F32) return Compute<float, operation>(a, b, result, stride, pad);
  if (a.element_type() == ffi::DataType::F64) return Compute<double, operation>(a, b, result, stride, pad);
  return ffi::Error::InvalidArgument("the native convolution takes float32 and float64.");
}

auto Binding() {
  auto operands = ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>();
  return std::move(operands).Attr<Int>("stride").Attr<Int>("pad");
}

}  // namespace

// (images, kernel) -> output; (output's gradient, kernel) -> images' gradient; (images, output's gradient) -> kernel's.
XLA_FFI_DEFINE_HANDLER_SYMBOL(forward, Call<kForward>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(image_gradient, Call<kImageGradient>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kernel_gradient, Call<kKernelGradient>, Binding());
