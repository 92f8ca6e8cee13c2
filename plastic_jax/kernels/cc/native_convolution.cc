// Convolutions for narrow nets on one CPU core, with the norms, ReLUs, statistics and sums around them; called from
// compiled JAX programs by XLA's foreign function interface.
//
// Images are NHWC and kernels HWIO, so what a row of taps sees, a few pixels of C channels each, lies contiguous in
// memory, and so does that row of the kernel. A loop over such a window, a value of it times a vector of outputs, with
// the sums of 16 vectors in registers, is all there is to a convolution. The shapes alone set the order of summation.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "native.h"

namespace {

struct Images {
  Int count, height, width, channels;
  Int size() const { return height * width * channels; }
};

// Runs f(i, j) for all values of an image; j, below `period`, tells the channel, and may be a vector's lane.
template <typename F>
void Each(Int count, Int period, const F& f) {
  for (Int i = 0; i < count; i += period) {
    const Int most = std::min(period, count - i);
    _Pragma("GCC ivdep") for (Int j = 0; j < most; ++j) f(i + j, j);
  }
}

// Long enough a row of channels, again and again, for a loop over it to pay.
template <typename T>
Int Period(Int channels) { return RoundUp(256, std::lcm(channels, kLanes<T>)); }

// factor (value - mean) + bias, by channel; [3, channels] of mean, factor and bias. Without them it is off.
template <typename T>
struct Affine {
  Affine(const T* rows, Int channels) : on(rows), period(Period<T>(channels)), held(rows ? 3 * period : 0) {
    for (Int n = 0; n < Int(held.size()); ++n) held[n] = rows[n / period * channels + n % period % channels];
    mean = held.data(), factor = mean + period, bias = factor + period;
  }
  T operator()(T value, Int j) const { return factor[j] * (value - mean[j]) + bias[j]; }
  bool on;
  Int period;
  std::vector<T> held;
  const T *mean, *factor, *bias;
};

// Sums of two numbers a value over all images, by channel: an image's in T, in lanes, and all of them in double.
template <typename T>
struct Sums {
  explicit Sums(Int channels) : channels(channels), period(Period<T>(channels)), lanes(2 * period), total(2 * channels) {}
  template <typename F>
  void Add(Int count, const F& numbers) {
    std::fill(lanes.begin(), lanes.end(), T(0));
    T *first = lanes.data(), *second = first + period;
    Each(count, period, [&](Int i, Int j) { numbers(i, j, first[j], second[j]); });
    double* to = total.data();
    for (const T* from = first; from < first + 2 * period; from += channels) {
      if (from == second) to += channels;
      for (Int c = 0; c < channels; ++c) to[c] += from[c];
    }
  }
  Int channels, period;
  std::vector<T> lanes;
  std::vector<double> total;
};

// Mean and biased variance by channel. What is summed are differences from the first image's means, which lie near.
template <typename T>
struct Statistics {
  explicit Statistics(Int channels) : sums(channels), shift(sums.period) {}
  void Add(const T* image, Int count) {
    const Int channels = sums.channels;
    if (!pixels) {
      sums.Add(count, [&](Int i, Int, T& one, T&) { one += image[i]; });
      for (Int j = 0; j < sums.period; ++j) shift[j] = sums.total[j % channels] * channels / count;
      std::fill(sums.total.begin(), sums.total.end(), 0.0);
    }
    pixels += count / channels;
    const T* from = shift.data();
    sums.Add(count, [&](Int i, Int j, T& one, T& two) {
      const T apart = image[i] - from[j];
      one += apart, two += apart * apart;
    });
  }
  void Write(T* out) const {
    const Int channels = sums.channels;
    for (Int c = 0; c < channels; ++c) {
      const double mean = sums.total[c] / pixels, square = sums.total[channels + c] / pixels;
      const double variance = square - mean * mean;
      out[c] = shift[c] + mean;
      out[channels + c] = variance < 0 ? 0 : variance;  // NaN stays
    }
  }
  Sums<T> sums;
  std::vector<T> shift;
  Int pixels = 0;
};

// Images with a border of zeros, `low` pixels before and `high` behind, and room behind the last one for vectors that
// stick out. The border is written once and serves all images in turn.
template <typename T>
struct Bordered {
  Bordered(const Images& in, Int low, Int high, Int group, Int room, Use use) : in(in), low(low) {
    out = {group, in.height + low + high, in.width + low + high, in.channels};
    data = Scratch<T>(use, group * out.size() + room);
    std::memset(data, 0, (group * out.size() + room) * sizeof(T));
  }
  // copy(to, from, count): moves a row of an image.
  template <typename Copy>
  const T* Fill(const T* images, Int count, const Copy& copy) const {
    const Int row = in.width * in.channels;
    for (Int n = 0; n < count * in.height; ++n, images += row) {
      const Int image = n / in.height, h = n % in.height;
      copy(data + image * out.size() + ((h + low) * out.width + low) * in.channels, images, row);
    }
    return data;
  }
  const T* Fill(const T* images, Int count) const {
    return Fill(images, count, [](T* to, const T* from, Int row) { std::memcpy(to, from, row * sizeof(T)); });
  }
  // What comes out of a norm and a ReLU, or the images as they are.
  const T* Fill(const T* images, Int count, const Affine<T>& norm) const {
    if (!norm.on) return Fill(images, count);
    return Fill(images, count, [&](T* to, const T* from, Int row) {
      Each(row, norm.period, [&](Int i, Int j) {
        const T value = norm(from[i], j);
        to[i] = value < T(0) ? T(0) : value;  // NaN stays
      });
    });
  }
  Images in, out;
  Int low;
  T* data;
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

// y: the convolution of the images, after a norm and a ReLU if there is one; statistics: of y, if they are wanted.
template <typename T>
void Forward(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* images, const T* kernel,
             const T* norm, T* out, T* statistics) {
  const Affine<T> before(norm, x.channels);
  const bool direct = !before.on && !pad;
  const Bordered<T> bordered(x, pad, pad, direct ? 0 : 1, 0, kImages);
  T* room = Convolution<T>::Room(x, y, taps, stride);
  const auto at = [&](Int i, Int j, Int c, Int o) {
    return kernel[((i * taps + j) * x.channels + c) * y.channels + o];
  };
  const Convolution<T> run(bordered.out, y, stride, taps, taps, 0, 0, 1, at, room);
  Statistics<T> seen(y.channels);
  for (Int n = 0; n < x.count; ++n, images += x.size(), out += y.size()) {
    run(direct ? images : bordered.Fill(images, 1, before), out);
    if (statistics) seen.Add(out, y.size());
  }
  if (statistics) seen.Write(statistics);
}

// Pixel stride * a + b gets gradient[a + (b + pad - i) / stride] from every tap i for which that is a whole number. So
// the pixels with equal b are a convolution of the gradient, with every stride-th tap, turned round: no zeros between.
template <typename T>
struct ImageGradient {
  ImageGradient(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* kernel)
      : x(x), unseen(taps < stride),
        bordered(y, stride == 1 ? taps - 1 - pad : 0, taps - 1 - pad, 1, 0, kBorder) {
    const Int behind = taps - 1 - pad;
    T* room = Convolution<T>::Room(y, x, taps, stride);
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
  }
  void operator()(const T* gradient, T* out) const {
    if (unseen) std::memset(out, 0, x.size() * sizeof(T));  // pixels that the kernel does not see
    const T* from = bordered.Fill(gradient, 1);
    for (const auto& part : parts) part(from, out);
  }
  Images x;
  bool unseen;
  Bordered<T> bordered;
  std::vector<Convolution<T>> parts;
};

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
struct KernelGradient {
  static constexpr Int kLeast = 64, kMost = 256;  // pixels a loop: enough to pay for its ends, few enough for the L1 cache
  static constexpr int kQ = 2 * kWide;
  KernelGradient(const Images& x, const Images& y, Int taps, Int stride)
      : y(y), taps(taps), stride(stride), c(x.channels), sharing(Sharing<T>(y.channels, y.width)),
        cols(y.width / sharing), values((taps + (sharing - 1) * stride) * c), window(RoundUp(values, kQ)),
        used(sharing * y.channels), lanes(RoundUp(used, kLanes<T>)),
        group(std::min(x.count, std::max<Int>(1, kLeast / (y.height * cols)))),
        sums(Scratch<T>(kSums, taps * window * lanes)) {
    std::memset(sums, 0, taps * window * lanes * sizeof(T));
  }
  // Bordered images and their outputs' gradients, `group` of them at most. What the vectors find where they stick out of
  // the window, or of the outputs, is not used.
  void Add(const Images& some, const T* from, const T* to) const {
    const Int rows = std::max<Int>(1, kMost / (group * cols)), pitch = some.width * c;
    for (Int row = 0; row < y.height; row += rows) {
      const Int step = sharing * stride * c, some_rows = std::min(rows, y.height - row);
      const Plane g{some_rows, cols, step, stride * pitch, taps, pitch, window, used, y.width * y.channels};
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
  void Write(T* out) const {
    const Int o = y.channels;
    for (Int n = 0; n < taps * taps * c; ++n, out += o) {
      const T* one = sums + (n / (taps * c) * window + n % (taps * c)) * lanes;
      for (Int l = 0; l < o; ++l) out[l] = sharing == 1 ? one[l] : one[l] + one[stride * c * lanes + o + l];
    }
  }
  Images y;
  Int taps, stride, c, sharing, cols, values, window, used, lanes, group;
  T* sums;
};

// What reaches the images, the kernel and the norm from the gradient of y, to which factor (y - mean) + bias is added
// first: that is what comes by way of the statistics. A result that is null is not wanted.
template <typename T>
void Backward(const Images& x, const Images& y, Int taps, Int stride, Int pad, const T* images, const T* kernel,
              const T* norm, const T* gradient, const T* outputs, const T* statistics, T* image_gradient,
              T* kernel_gradient, T* norm_sums) {
  const Affine<T> before(norm, x.channels), after(statistics, y.channels);
  const KernelGradient<T> correlation(x, y, taps, stride);
  const Int group = correlation.group;
  const Bordered<T> bordered(x, pad, pad, group, correlation.window - correlation.values, kImages);
  const Bordered<T> flat(y, 0, 0, group, correlation.lanes - correlation.used, kGradient);
  const ImageGradient<T> convolution(x, y, taps, stride, pad, kernel);
  Sums<T> sums(x.channels);
  for (Int first = 0; first < x.count; first += group) {
    Images some = bordered.out;
    some.count = std::min(group, x.count - first);
    const T* in = images + first * x.size();
    const T* of = flat.Fill(gradient + first * y.size(), some.count, [&](T* to, const T* from, Int row) {
      if (!after.on) return void(std::memcpy(to, from, row * sizeof(T)));
      const T* value = outputs + (from - gradient);
      Each(row, after.period, [&](Int i, Int j) { to[i] = from[i] + after(value[i], j); });
    });
    if (kernel_gradient) correlation.Add(some, bordered.Fill(in, some.count, before), of);
    for (Int n = 0; n < some.count && image_gradient; ++n, image_gradient += x.size(), in += x.size(), of += y.size()) {
      convolution(of, image_gradient);
      if (!before.on) continue;
      sums.Add(x.size(), [&](Int i, Int j, T& one, T& two) {
        const T passed = before(in[i], j) > T(0) ? image_gradient[i] : T(0);
        one += passed * (in[i] - before.mean[j]), two += passed;
        image_gradient[i] = passed * before.factor[j];
      });
    }
  }
  if (kernel_gradient) correlation.Write(kernel_gradient);
  if (norm_sums) std::copy(sums.total.begin(), sums.total.end(), norm_sums);
}

// The gradient of ReLU(norm(one) + norm(other)) = out, passed on to both, and sums for those of the norms. Without the
// other, these are null.
template <typename T>
void Join(const Images& y, const T* gradient, const T* out, const T* one, const T* norm, const T* other,
          const T* other_norm, T* to_one, T* to_other, T* norm_sums, T* other_sums) {
  const Affine<T> first(norm, y.channels), second(other ? other_norm : norm, y.channels);
  Sums<T> sums(y.channels), others(y.channels);
  for (Int n = 0; n < y.count; ++n, gradient += y.size(), out += y.size(), one += y.size(), to_one += y.size()) {
    sums.Add(y.size(), [&](Int i, Int j, T& product, T& sum) {
      const T passed = out[i] > T(0) ? gradient[i] : T(0);
      product += passed * (one[i] - first.mean[j]), sum += passed;
      to_one[i] = passed * first.factor[j];
    });
    if (!other) continue;
    others.Add(y.size(), [&](Int i, Int j, T& product, T& sum) {
      const T passed = out[i] > T(0) ? gradient[i] : T(0);
      product += passed * (other[i] - second.mean[j]), sum += passed;
      to_other[i] = passed * second.factor[j];
    });
    other += y.size(), to_other += y.size();
  }
  std::copy(sums.total.begin(), sums.total.end(), norm_sums);
  if (other) std::copy(others.total.begin(), others.total.end(), other_sums);
}

Images Shape(ffi::AnyBuffer buffer) {
  const auto sizes = buffer.dimensions();
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

ffi::Error CallForward(Buffer images, Buffer kernel, Buffer norm, Result out, Result statistics, Int stride, Int pad) {
  return Typed(images.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Forward<T>(Shape(images), Shape(*out), kernel.dimensions()[0], stride, pad, Data<T>(images), Data<T>(kernel),
               Data<T>(norm), Data<T>(*out), Data<T>(*statistics));
  });
}

ffi::Error CallBackward(Buffer images, Buffer kernel, Buffer norm, Buffer gradient, Buffer outputs, Buffer statistics,
                        Result image_gradient, Result kernel_gradient, Result norm_sums, Int stride, Int pad) {
  return Typed(images.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Backward<T>(Shape(images), Shape(gradient), kernel.dimensions()[0], stride, pad, Data<T>(images), Data<T>(kernel),
                Data<T>(norm), Data<T>(gradient), Data<T>(outputs), Data<T>(statistics), Data<T>(*image_gradient),
                Data<T>(*kernel_gradient), Data<T>(*norm_sums));
  });
}

ffi::Error CallJoin(Buffer gradient, Buffer out, Buffer one, Buffer norm, Buffer other, Buffer other_norm,
                    Result to_one, Result norm_sums, Result to_other, Result other_sums) {
  return Typed(gradient.element_type(), [&](auto zero) {
    using T = decltype(zero);
    Join<T>(Shape(gradient), Data<T>(gradient), Data<T>(out), Data<T>(one), Data<T>(norm), Data<T>(other),
            Data<T>(other_norm), Data<T>(*to_one), Data<T>(*to_other), Data<T>(*norm_sums), Data<T>(*other_sums));
  });
}

}  // namespace

// images, kernel, norm -> y, statistics.
XLA_FFI_DEFINE_HANDLER_SYMBOL(forward, CallForward,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<Int>("stride").Attr<Int>("pad"));
// images, kernel, norm, gradient of y, y, what to add -> gradients of images and kernel, sums for that of the norm.
XLA_FFI_DEFINE_HANDLER_SYMBOL(backward, CallBackward,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>()
                                  .Attr<Int>("stride").Attr<Int>("pad"));
// gradient of out, out, one, its norm, other, its norm -> gradient of one, sums for that of its norm, and of the other.
XLA_FFI_DEFINE_HANDLER_SYMBOL(join, CallJoin,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>().Ret<Buffer>());
