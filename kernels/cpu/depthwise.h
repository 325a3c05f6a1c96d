// Convolutions that have a kernel of their own for every channel. A few channels, as many as a vector holds, are worked
// on together, row after row. The rows that are read lie in a ring, widened, channels innermost and with zeros where the
// padding is: so both layouts and every storage type share the loops, which have no borders. A norm and an activation
// may be applied to what goes into the ring, so that the result of these need not exist.
#pragma once

#include <memory>

#include "activate.h"
#include "affine.h"
#include "vector.h"

namespace normpass {

constexpr int64_t most_vectors = 8;  // of channels in a ring

struct Images {
  int64_t samples, channels, height, width;
  bool channels_last;
};

// Vectors of channels in a ring: lines that lie side by side, as long as every thread gets some samples' parts.
template <class A> int64_t vectors_at_once(const Images& images, int64_t threads) {
  const int64_t all = (images.channels + Vector<A>::lanes - 1) / Vector<A>::lanes;
  const int64_t most = std::max<int64_t>(1, std::min(most_vectors, images.samples * all / (4 * threads)));
  const int64_t blocks = (all + most - 1) / most;
  return (all + blocks - 1) / blocks;
}

// Whether an array of a channels_last result is written past the caches, in whole vectors.
template <class A> bool is_streamed(const Images& images, const A* values) {
  const int64_t bytes = images.samples * images.channels * images.height * images.width * sizeof(A);
  return bytes >= streamed_from && images.channels % Vector<A>::lanes == 0 &&
         reinterpret_cast<uintptr_t>(values) % 64 == 0;
}

// What will be read next, to be asked for a pixel at a time while others are computed with. Asked for at once, a row takes
// as long as reading it does.
template <class S> struct Ahead {
  const S* pixel;
  int64_t step;
  NORMPASS_ALWAYS_INLINE void prefetch(int64_t x) const { __builtin_prefetch(pixel + x * step, 0, 2); }
};

// The per-channel values of one vector of channels, over and over, as many as fill a line.
template <class A> struct VectorChannels {
  alignas(64) A mean[line<A>], scale[line<A>], shift[line<A>];
  VectorChannels(const Affine<A>& affine, int64_t channel) {
    for (int64_t i = 0; i < line<A>; i += lanes<A>) {
      std::memcpy(mean + i, affine.mean.data() + channel, vector_bytes);
      std::memcpy(scale + i, affine.scale.data() + channel, vector_bytes);
      std::memcpy(shift + i, affine.shift.data() + channel, vector_bytes);
    }
  }
};

// What is done to x before it is convolved: nothing, or a norm with its activation.
template <class A> struct Entry {
  std::unique_ptr<Affine<A>> affine;
  Activated<A> activated{ActivationCall{}};

  void apply(A* pixels, int64_t count, int64_t channel, const Ahead<A>& next) const {
    const VectorChannels<A> at(*affine, channel);
    activated.value({pixels, nullptr, nullptr, pixels, at.mean, at.scale, at.shift, 0, count * lanes<A>, next.pixel,
                     nullptr, next.step});
  }
};

template <class A>
Entry<A> entry_of(int64_t channels, const void* weight, const void* bias, const void* mean, const void* var, double eps,
                  const ActivationCall& call) {
  if (mean == nullptr) return {nullptr, Activated<A>(call)};
  return {std::make_unique<Affine<A>>(round_up(channels, Vector<A>::lanes), channels, static_cast<const A*>(weight),
                                      static_cast<const A*>(bias), static_cast<const A*>(mean),
                                      static_cast<const A*>(var), eps),
          Activated<A>(call)};
}

// The last rows of some vectors of channels of one sample, as [vector][row of the ring][pixel][lane].
template <class S> class Ring {
 public:
  using A = Wide<S>;
  using V = Vector<A>;
  // `before`: columns of padding in front; `pitch`: columns in all.
  Ring(const Images& images, int64_t rows, int64_t before, int64_t pitch, int64_t vectors)
      : images_(images), rows_(rows), before_(before), pitch_(pitch), values_(vectors * rows * pitch, V{}) {}

  // Begins with another sample or other channels: `count` of them, from `channel` on.
  void begin(const S* images, int64_t sample, int64_t channel, int64_t count) {
    const int64_t step = images_.channels_last ? images_.channels : 1, size = images_.height * images_.width * step;
    const bool last = channel + count >= images_.channels;
    from_ = images, sample_ = sample, channel_ = channel, count_ = count, next_ = 0;
    following_ = images + (last ? (sample + 1) * size : sample * size + channel + count);
  }
  // Reads the rows before `end` that are not in the ring yet; those before `first` are not needed.
  void advance(int64_t first, int64_t end) {
    for (next_ = std::max(next_, first); next_ < std::min(end, images_.height); ++next_) gather<false>(next_);
  }
  // With a norm or without.
  void advance(int64_t first, int64_t end, const Entry<A>& entry) {
    for (next_ = std::max(next_, first); next_ < std::min(end, images_.height); ++next_) {
      if (entry.affine == nullptr) {
        gather<true>(next_);
        continue;
      }
      gather<false>(next_);
      if constexpr (std::is_same<S, A>::value)  // there is no norm before narrow storage
        for (int64_t v = 0; v * V::lanes < count_; ++v)
          entry.apply(row(v, next_), images_.width, channel_ + v * V::lanes, ahead(v, next_ + 1));
    }
  }
  // A vector's part of the row that will be read next, perhaps of the channels or the sample that come then.
  Ahead<S> ahead(int64_t vector) const { return ahead(vector, next_); }
  // The pixels of a row, to change them.
  A* row(int64_t vector, int64_t y) { return reinterpret_cast<A*>(place(vector, y) + before_); }
  // Where a vector's rows begin; and from there a row, its first column of padding.
  const V* pixels(int64_t vector) const { return &values_[vector * rows_ * pitch_]; }
  int64_t offset(int64_t y) const { return y % rows_ * pitch_; }
  const V* first_pixel(int64_t vector, int64_t y) const { return pixels(vector) + offset(y) + before_; }

 private:
  V* place(int64_t vector, int64_t y) { return &values_[vector * rows_ * pitch_ + offset(y)]; }

  Ahead<S> ahead(int64_t vector, int64_t y) const {
    const int64_t channels = images_.channels, row = images_.width * channels, lane = vector * V::lanes;
    if (!images_.channels_last) return {from_, 0};
    if (y >= images_.height) return {following_ + (y - images_.height) * row + lane, channels};
    return {from_ + (sample_ * images_.height + y) * row + channel_ + lane, channels};
  }

  template <bool ASKS> void gather(int64_t y) {
    const int64_t width = images_.width, channels = images_.channels, step = rows_ * pitch_ * V::lanes;
    A* to = row(0, y);
    if (images_.channels_last) {
      const S* pixel = from_ + (sample_ * images_.height + y) * width * channels + channel_;
      for (int64_t x = 0; x < width; ++x, pixel += channels)
        for (int64_t c = 0; c < count_; c += V::lanes) {
          A* target = to + c / V::lanes * step + x * V::lanes;
          if (ASKS) __builtin_prefetch(pixel + c + width * channels, 0, 2);
          if (c + V::lanes <= count_) copy_wide(pixel + c, target, V::lanes);
          else copy_wide(pixel + c, target, count_ - c);
        }
      return;
    }
    for (int64_t c = 0; c < count_; ++c) {
      const S* row = from_ + ((sample_ * channels + channel_ + c) * images_.height + y) * width;
      A* target = to + c / V::lanes * step + c % V::lanes;
      for (int64_t x = 0; x < width; ++x) copy_wide(row + x, target + x * V::lanes, 1);
    }
  }
  static NORMPASS_ALWAYS_INLINE void copy_wide(const S* from, A* to, int64_t n) {
    if constexpr (std::is_same<S, A>::value) std::memcpy(to, from, n * sizeof(S));
    else widen(from, to, n);
  }

  Images images_;
  int64_t rows_, before_, pitch_;
  Values<V> values_;
  const S *from_ = nullptr, *following_ = nullptr;
  int64_t sample_ = 0, channel_ = 0, count_ = 0, next_ = 0;
};

}  // namespace normpass
