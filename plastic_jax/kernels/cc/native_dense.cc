// A perceptron's products of matrices and Adam's update on one CPU core, called as native_convolution.cc is.
//
// XLA's own pack both operands first, and write the gradients of a narrow layer's kernel in a form of their own; small
// batches leave too little arithmetic to pay for that. The shapes alone set the order of summation.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "native.h"

namespace {

// R rows of N vectors of a product over `depth`: a's rows lie a_row apart and its columns a_step. Of the last vector only
// so many lanes are written.
template <typename T, int R, int N>
inline void Tile(Int depth, const T* a, Int a_row, Int a_step, const T* b, Int b_row, T* y, Int y_row, Int lanes) {
  Vector<T> sum[R][N] = {};
  for (Int k = 0; k < depth; ++k, a += a_step, b += b_row) {
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int n = 0; n < N; ++n) sum[r][n] += a[r * a_row] * At(b + n * kLanes<T>);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    if (lanes < kLanes<T>) {
      std::memcpy(y + r * y_row, &sum[r], lanes * sizeof(T));
    } else {
      UNROLL for (int n = 0; n < N; ++n) At(y + r * y_row + n * kLanes<T>) = sum[r][n];
    }
  }
}

// R rows of a product, two vectors of columns at a time. The last vector overlaps its neighbour, and the same values are
// written twice.
template <typename T, int R>
void Row(Int depth, Int columns, const T* a, Int a_row, Int a_step, const T* b, Int b_row, T* y) {
  constexpr Int kOne = kLanes<T>;
  Int n = 0;
  for (; n + 2 * kOne <= columns; n += 2 * kOne) Tile<T, R, 2>(depth, a, a_row, a_step, b + n, b_row, y + n, columns, kOne);
  for (; n < columns; n += kOne) {
    const Int first = std::max<Int>(0, std::min(n, columns - kOne));
    Tile<T, R, 1>(depth, a, a_row, a_step, b + first, b_row, y + first, columns, columns);
  }
}

// y[rows, columns] = a b with b [depth, columns], or [columns, depth] if it is turned.
template <typename T>
void Product(Int rows, Int depth, Int columns, const T* a, Int a_row, Int a_step, const T* b, bool turned, T* y) {
  Int b_row = columns;
  if (turned || columns < kLanes<T>) {  // as it is read, and no vector beyond its end
    b_row = std::max(columns, kLanes<T>);
    T* to = Scratch<T>(kPanel, depth * b_row);
    for (Int first = 0; first < columns; first += kLanes<T>) {
      const Int last = std::min(columns, first + kLanes<T>);
      for (Int k = 0; k < depth; ++k) {
        for (Int n = first; n < last; ++n) to[k * b_row + n] = turned ? b[n * depth + k] : b[k * columns + n];
      }
    }
    b = to;
  }
  const Int some = rows < kWide ? 1 : kWide;
  const auto run = rows < kWide ? Row<T, 1> : Row<T, kWide>;
  for (Int row = 0; row < rows; row += some) {
    const Int first = std::min(row, rows - some);
    run(depth, columns, a + first * a_row, a_row, a_step, b, b_row, y + first * columns);
  }
}

// Adam's update in one pass; plastic_jax/methods/optimisers/adam.py has the formula. numbers: whether to update at all,
// learning rate, and what undoes the bias of the two moments.
template <typename T>
void Adam(Int count, const T* numbers, const T* gradient, const T* old_param, const T* old_mean, const T* old_square,
          T* param, T* mean, T* square) {
  const T rate = numbers[1], of_mean = numbers[2], of_square = numbers[3];
  const auto keep = [&](T* to, const T* from) {
    if (to != from) std::memcpy(to, from, count * sizeof(T));
  };
  if (numbers[0] == T(0)) return keep(param, old_param), keep(mean, old_mean), keep(square, old_square);
  _Pragma("GCC ivdep") for (Int i = 0; i < count; ++i) {
    const T g = gradient[i];
    const T m = T(0.9) * old_mean[i] + T(1 - 0.9) * g, s = T(0.999) * old_square[i] + T(1 - 0.999) * (g * g);
    mean[i] = m, square[i] = s;
    param[i] = old_param[i] - rate * (m * of_mean / (std::sqrt(s * of_square) + T(1e-8)));
  }
}

ffi::Error CallProduct(Buffer a, Buffer b, Result y, Int a_turned, Int b_turned) {
  return Typed(a.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Int rows = y->dimensions()[0], columns = y->dimensions()[1], depth = a.dimensions()[1 - a_turned];
    const Int a_row = a_turned ? 1 : depth, a_step = a_turned ? rows : 1;
    Product<T>(rows, depth, columns, Data<T>(a), a_row, a_step, Data<T>(b), b_turned, Data<T>(*y));
  });
}

ffi::Error CallAdam(Buffer numbers, ffi::RemainingArgs in, ffi::RemainingRets out) {
  return Typed(numbers.element_type(), [&](auto zero) {
    using T = decltype(zero);
    const Int leaves = out.size() / 3;
    const auto from = [&](Int n) { return Data<T>(*in.get<Buffer>(n)); };
    const auto to = [&](Int n) { return Data<T>(**out.get<Buffer>(n)); };
    for (Int n = 0; n < leaves; ++n) {
      Adam<T>(in.get<Buffer>(n)->element_count(), Data<T>(numbers), from(n), from(n + leaves), from(n + 2 * leaves),
              from(n + 3 * leaves), to(n), to(n + leaves), to(n + 2 * leaves));
    }
  });
}

}  // namespace

// a, b, either of them turned -> their product.
XLA_FFI_DEFINE_HANDLER_SYMBOL(product, CallProduct,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>().Attr<Int>("a_turned")
                                  .Attr<Int>("b_turned"));
// numbers, and of each parameter its gradient, itself, its moments -> the last three; all of one kind after another.
XLA_FFI_DEFINE_HANDLER_SYMBOL(adam, CallAdam, ffi::Ffi::Bind().Arg<Buffer>().RemainingArgs().RemainingRets());
