// The activations: value, derivative and inverse of each, for the C++ and the CUDA kernels.
//
// One struct per entry of the table in kernels/activations.py, with the same formulas as ATen:
//
//   value(y)        z = act(y)
//   gradient(g, y)  dL/dy from g = dL/dz; where act is flat it is 0 even for an infinite g, as in ATen
//   inverse(z)      y = act⁻¹(z); meant for the entries that Python calls invertible
//   passes(y), gradient_if(passes, g)   the same gradient where act' is one of two numbers: one bit says which
//   is_costly       whether gradient() takes longer on a CPU than one move of its result to memory and back
//
// T is float or double. The functions exponential, exponential_minus_1, logarithm_of_1_plus, hyperbolic_tangent
// and normal_at are given by the includer (cpu/math.h, cuda/math.cuh), before this file. All are written
// without branches, so that a loop over them vectorises.
#pragma once

#ifdef __CUDACC__
#define NORMPASS_INLINE __device__ __forceinline__
#else
#define NORMPASS_INLINE inline __attribute__((always_inline))
#endif

namespace normpass {

template <class T> NORMPASS_INLINE T sigmoid_of(T y) { return T(1) / (T(1) + exponential(-y)); }

// A NaN is neither above nor below anything: comparisons are written so that it goes through.
template <class T> NORMPASS_INLINE T clamped(T y, T low, T high) {
  y = y < low ? low : y;
  return y > high ? high : y;
}

template <class T> struct Identity {
  static constexpr bool is_costly = false;
  NORMPASS_INLINE explicit Identity(double, double) {}
  NORMPASS_INLINE T value(T y) const { return y; }
  NORMPASS_INLINE T gradient(T g, T) const { return g; }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Relu {
  static constexpr bool is_costly = false;
  NORMPASS_INLINE explicit Relu(double, double) {}
  NORMPASS_INLINE T value(T y) const { return y < T(0) ? T(0) : y; }
  NORMPASS_INLINE T gradient(T g, T y) const { return y <= T(0) ? T(0) : g; }
  NORMPASS_INLINE bool passes(T y) const { return !(y <= T(0)); }
  NORMPASS_INLINE T gradient_if(bool passes, T g) const { return passes ? g : T(0); }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Hardtanh {
  static constexpr bool is_costly = false;
  T low, high;
  NORMPASS_INLINE explicit Hardtanh(double low, double high) : low(T(low)), high(T(high)) {}
  NORMPASS_INLINE T value(T y) const { return clamped(y, low, high); }
  NORMPASS_INLINE T gradient(T g, T y) const { return (y <= low) | (y >= high) ? T(0) : g; }
  NORMPASS_INLINE bool passes(T y) const { return !((y <= low) | (y >= high)); }
  NORMPASS_INLINE T gradient_if(bool passes, T g) const { return passes ? g : T(0); }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct LeakyRelu {
  static constexpr bool is_costly = false;
  T slope, reciprocal;
  NORMPASS_INLINE explicit LeakyRelu(double slope, double) : slope(T(slope)), reciprocal(T(1 / slope)) {}
  NORMPASS_INLINE T value(T y) const {
    T below = y * slope;
    return y > T(0) ? y : below;
  }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T below = g * slope;
    return y > T(0) ? g : below;
  }
  NORMPASS_INLINE bool passes(T y) const { return y > T(0); }
  NORMPASS_INLINE T gradient_if(bool passes, T g) const {
    T below = g * slope;
    return passes ? g : below;
  }
  NORMPASS_INLINE T inverse(T z) const {
    T below = z * reciprocal;
    return z > T(0) ? z : below;
  }
};

// scale·y above 0, scale·alpha·(exp(input_scale·y) − 1) below: ELU, SELU and CELU.
template <class T> struct ExponentialUnit {
  static constexpr bool is_costly = true;
  T alpha, scale, input_scale, smallest;
  NORMPASS_INLINE ExponentialUnit(double alpha, double scale, double input_scale)
      : alpha(T(alpha)), scale(T(scale)), input_scale(T(input_scale)),
        smallest(sizeof(T) == 8 ? T(2.220446049250313e-16) - T(1) : T(1.1920929e-07f) - T(1)) {}
  NORMPASS_INLINE T value(T y) const {
    T scaled = y * input_scale;
    T below = alpha * exponential_minus_1(y > T(0) ? T(0) : scaled);
    return scale * (y > T(0) ? y : below);
  }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T scaled = y * input_scale;
    T slope = alpha * input_scale * exponential(y > T(0) ? T(0) : scaled);
    return g * scale * (y > T(0) ? T(1) : slope);
  }
  // z = −scale·alpha is reached only by rounding: the logarithm of 0 is kept away.
  NORMPASS_INLINE T inverse(T z) const {
    T share = clamped(z / (scale * alpha), smallest, T(0));
    return z > T(0) ? z / scale : logarithm_of_1_plus(share) / input_scale;
  }
};

template <class T> struct Elu : ExponentialUnit<T> {
  NORMPASS_INLINE explicit Elu(double alpha, double) : ExponentialUnit<T>(alpha, 1, 1) {}
};

template <class T> struct Selu : ExponentialUnit<T> {
  NORMPASS_INLINE explicit Selu(double, double)
      : ExponentialUnit<T>(1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1) {}
};

template <class T> struct Celu : ExponentialUnit<T> {
  NORMPASS_INLINE explicit Celu(double alpha, double) : ExponentialUnit<T>(alpha, 1, 1 / alpha) {}
};

template <class T> struct Silu {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit Silu(double, double) {}
  NORMPASS_INLINE T value(T y) const { return y / (T(1) + exponential(-y)); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T s = sigmoid_of(y);
    return g * (s * (T(1) + y * (T(1) - s)));
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Gelu {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit Gelu(double, double) {}
  NORMPASS_INLINE T value(T y) const { return y * normal_at(y).distribution; }
  NORMPASS_INLINE T gradient(T g, T y) const {
    const auto normal = normal_at(y);
    return g * (normal.distribution + y * (T(0.39894228040143267794) * normal.bell));
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct GeluTanh {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit GeluTanh(double, double) {}
  static NORMPASS_INLINE T inner(T y) {
    return T(0.79788456080286535588) * (y + T(0.044715) * y * y * y);
  }
  NORMPASS_INLINE T value(T y) const { return T(0.5) * y * (T(1) + hyperbolic_tangent(inner(y))); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T t = hyperbolic_tangent(inner(y));
    T slope = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * y * y);
    return g * (T(0.5) * (T(1) + t) + T(0.5) * y * (T(1) - t * t) * slope);
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Hardswish {
  static constexpr bool is_costly = false;
  NORMPASS_INLINE explicit Hardswish(double, double) {}
  NORMPASS_INLINE T value(T y) const { return y * clamped(y + T(3), T(0), T(6)) / T(6); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T middle = g * (y / T(3) + T(0.5));
    return y <= T(-3) ? T(0) : (y >= T(3) ? g : middle);
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Hardsigmoid {
  static constexpr bool is_costly = false;
  NORMPASS_INLINE explicit Hardsigmoid(double, double) {}
  NORMPASS_INLINE T value(T y) const { return clamped(y + T(3), T(0), T(6)) / T(6); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T middle = g * T(1.f / 6.f);  // ATen rounds it to float in double too
    return (y > T(-3)) & (y < T(3)) ? middle : T(0);
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Sigmoid {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit Sigmoid(double, double) {}
  NORMPASS_INLINE T value(T y) const { return sigmoid_of(y); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T z = sigmoid_of(y);
    return g * (T(1) - z) * z;
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Tanh {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit Tanh(double, double) {}
  NORMPASS_INLINE T value(T y) const { return hyperbolic_tangent(y); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T z = hyperbolic_tangent(y);
    return g * (T(1) - z * z);
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Softplus {
  static constexpr bool is_costly = true;
  T beta, threshold;
  NORMPASS_INLINE explicit Softplus(double beta, double threshold) : beta(T(beta)), threshold(T(threshold)) {}
  NORMPASS_INLINE T value(T y) const {
    T scaled = y * beta;
    T soft = logarithm_of_1_plus(exponential(scaled > threshold ? T(0) : scaled)) / beta;
    return scaled > threshold ? y : soft;
  }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T scaled = y * beta;
    return scaled > threshold ? g : g * sigmoid_of(scaled);
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

// With e = exp(y), tanh(log(1 + e)) = n/(n + 2) for n = e·(e + 2): no logarithm is needed.
template <class T> struct Mish {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit Mish(double, double) {}
  static NORMPASS_INLINE T gate(T y) {
    T e = exponential(y > T(20) ? T(20) : y);  // beyond, the gate is 1 in float and in double
    T n = e * (e + T(2));
    return n / (n + T(2));
  }
  NORMPASS_INLINE T value(T y) const { return y * gate(y); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T t = gate(y);
    return g * (t + y * sigmoid_of(y) * (T(1) - t * t));
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

// Not 0 but NaN where y is infinite, as in ATen: z is ∞/∞ there.
template <class T> struct Softsign {
  static constexpr bool is_costly = false;
  NORMPASS_INLINE explicit Softsign(double, double) {}
  static NORMPASS_INLINE T divisor(T y) { return T(1) + (y < T(0) ? -y : y); }
  NORMPASS_INLINE T value(T y) const { return y / divisor(y); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T share = T(1) / divisor(y), z = y * share;
    return g * share * (share + (z - z));
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct LogSigmoid {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit LogSigmoid(double, double) {}
  static NORMPASS_INLINE T decay(T y) { return exponential(y < T(0) ? y : -y); }  // exp(−|y|)
  NORMPASS_INLINE T value(T y) const { return (y < T(0) ? y : T(0)) - logarithm_of_1_plus(decay(y)); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T e = decay(y), share = e / (T(1) + e);
    return g * (y < T(0) ? T(1) - share : share);
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

// What both shrinking functions let through.
template <class T> struct Shrink {
  static constexpr bool is_costly = false;
  T lambd;
  NORMPASS_INLINE explicit Shrink(double lambd) : lambd(T(lambd)) {}
  NORMPASS_INLINE bool passes(T y) const { return (y < -lambd) | (y > lambd); }
  NORMPASS_INLINE T gradient(T g, T y) const { return passes(y) ? g : T(0); }
  NORMPASS_INLINE T gradient_if(bool passes, T g) const { return passes ? g : T(0); }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Hardshrink : Shrink<T> {
  NORMPASS_INLINE explicit Hardshrink(double lambd, double) : Shrink<T>(lambd) {}
  NORMPASS_INLINE T value(T y) const { return (y >= -this->lambd) & (y <= this->lambd) ? T(0) : y; }
};

template <class T> struct Softshrink : Shrink<T> {
  NORMPASS_INLINE explicit Softshrink(double lambd, double) : Shrink<T>(lambd) {}
  NORMPASS_INLINE T value(T y) const {
    T above = y - this->lambd, below = y + this->lambd, inside = y * T(0);
    return y > this->lambd ? above : (y < -this->lambd ? below : inside);
  }
};

template <class T> struct Tanhshrink {
  static constexpr bool is_costly = true;
  NORMPASS_INLINE explicit Tanhshrink(double, double) {}
  NORMPASS_INLINE T value(T y) const { return y - hyperbolic_tangent(y); }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T t = hyperbolic_tangent(y);
    return g - g * (T(1) - t * t);
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

// A bound that is infinite is none.
template <class T> struct Clamp {
  static constexpr bool is_costly = false;
  T low, high;
  NORMPASS_INLINE explicit Clamp(double low, double high) : low(T(low)), high(T(high)) {}
  NORMPASS_INLINE T value(T y) const { return clamped(y, low, high); }
  NORMPASS_INLINE bool passes(T y) const { return (y >= low) & (y <= high); }
  NORMPASS_INLINE T gradient(T g, T y) const { return passes(y) ? g : T(0); }
  NORMPASS_INLINE T gradient_if(bool passes, T g) const { return passes ? g : T(0); }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

// The same, but where y is one of the bounds the gradient is 0.
template <class T> struct OpenClamp {
  static constexpr bool is_costly = false;
  T low, high, above, below;
  NORMPASS_INLINE explicit OpenClamp(double low, double high)
      : low(T(low)), high(T(high)), above(T(low + (low - low))), below(T(high + (high - high))) {}  // ∞ − ∞ is NaN
  NORMPASS_INLINE T value(T y) const { return clamped(y, low, high); }
  NORMPASS_INLINE bool passes(T y) const { return (y == y) & !(y <= above) & !(y >= below); }
  NORMPASS_INLINE T gradient(T g, T y) const { return passes(y) ? g : T(0); }
  NORMPASS_INLINE T gradient_if(bool passes, T g) const { return passes ? g : T(0); }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct Threshold {
  static constexpr bool is_costly = false;
  T threshold, below;
  NORMPASS_INLINE explicit Threshold(double threshold, double below) : threshold(T(threshold)), below(T(below)) {}
  NORMPASS_INLINE T value(T y) const { return y <= threshold ? below : y; }
  NORMPASS_INLINE bool passes(T y) const { return !(y <= threshold); }
  NORMPASS_INLINE T gradient(T g, T y) const { return y <= threshold ? T(0) : g; }
  NORMPASS_INLINE T gradient_if(bool passes, T g) const { return passes ? g : T(0); }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

template <class T> struct SquaredRelu {
  static constexpr bool is_costly = false;
  NORMPASS_INLINE explicit SquaredRelu(double, double) {}
  NORMPASS_INLINE T value(T y) const {
    T above = y < T(0) ? T(0) : y;
    return above * above;
  }
  NORMPASS_INLINE T gradient(T g, T y) const {
    T above = T(2) * y * g;
    return y <= T(0) ? T(0) : above;
  }
  NORMPASS_INLINE T inverse(T z) const { return z; }
};

}  // namespace normpass

// The code of each activation in a kernel's arguments; the names are Python's.
#define NORMPASS_FOR_EACH_ACTIVATION(X) \
  X(0, identity, Identity)              \
  X(1, relu, Relu)                      \
  X(2, hardtanh, Hardtanh)              \
  X(3, leaky_relu, LeakyRelu)           \
  X(4, elu, Elu)                        \
  X(5, selu, Selu)                      \
  X(6, celu, Celu)                      \
  X(7, silu, Silu)                      \
  X(8, gelu, Gelu)                      \
  X(9, gelu_tanh, GeluTanh)             \
  X(10, hardswish, Hardswish)           \
  X(11, hardsigmoid, Hardsigmoid)       \
  X(12, sigmoid, Sigmoid)               \
  X(13, tanh, Tanh)                     \
  X(14, softplus, Softplus)             \
  X(15, mish, Mish)                     \
  X(16, softsign, Softsign)             \
  X(17, log_sigmoid, LogSigmoid)        \
  X(18, hardshrink, Hardshrink)         \
  X(19, softshrink, Softshrink)         \
  X(20, tanhshrink, Tanhshrink)         \
  X(21, clamp, Clamp)                   \
  X(22, open_clamp, OpenClamp)          \
  X(23, threshold, Threshold)           \
  X(24, squared_relu, SquaredRelu)
