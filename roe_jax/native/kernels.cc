// Expert layers and matrix products with up to some hundred tokens on CPUs.
//
// Weights are read in their storage format, dequantized in registers (with many tokens, a tile at a
// time), and multiplied in float32 with all tokens that need them. Every sum has a fixed order, so results do not depend
// on the number of threads.
//
// A *unit* is four vectors of V elements, the unit of reading. A format loads the codes of a unit
// as 32-bit lanes and takes one element from every lane at a time; so vectors hold elements in
// an order of their own, in which activations are also held (`reorder`).
//
// Built by build.py. Without ROE_JAX_FFI defined it is only the kernels, for tests of their own.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace roe {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

#define ROE_INLINE inline __attribute__((always_inline))
#define ROE_UNROLL _Pragma("GCC unroll 8")

template <int V>
struct Simd {
  typedef float Floats __attribute__((vector_size(4 * V)));
  typedef int32_t Ints __attribute__((vector_size(4 * V)));
  typedef int8_t Bytes __attribute__((vector_size(4 * V)));
};
template <int V>
using Floats = typename Simd<V>::Floats;
template <int V>
using Ints = typename Simd<V>::Ints;
template <int V>
using Bytes = typename Simd<V>::Bytes;

template <class T>
ROE_INLINE T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class To, class From>
ROE_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return load<To>(&value);
}

// Keeps a vector in a register if asked to; else compilers may load it anew for each of its uses.
template <int V, bool keeps = true>
ROE_INLINE Floats<V> kept(Floats<V> v) {
#if defined(__x86_64__)
  if constexpr (V > 1 && keeps) asm("" : "+v"(v));
#elif defined(__aarch64__)
  if constexpr (V > 1 && keeps) asm("" : "+w"(v));
#endif
  return v;
}

template <int V>
ROE_INLINE float total(Floats<V> v) {
  if constexpr (V == 1) {
    return v[0];
  } else {
    Floats<V / 2> halves[2];
    std::memcpy(halves, &v, sizeof v);
    return total<V / 2>(halves[0] + halves[1]);
  }
}

// Sums of numbers by the bits of an index: of up to four, the lowest bit first, and an offset.
struct Table {
  Floats<8> halves[2];  // by the lower three bits; by the fourth

  template <int K>
  static ROE_INLINE Table of(float offset, const float* values) {
    constexpr Floats<8> kBit[] = {
        {0, 1, 0, 1, 0, 1, 0, 1}, {0, 0, 1, 1, 0, 0, 1, 1}, {0, 0, 0, 0, 1, 1, 1, 1}};
    Floats<8> low = Floats<8>{} + offset;
    ROE_UNROLL for (int k = 0; k < std::min(K, 3); k++) low += kBit[k] * values[k];
    return {{low, K > 3 ? low + values[K - 1] : low}};
  }

  // Returns the sums of the low K bits of every lane of `index`.
  template <int K, int V>
  ROE_INLINE Floats<V> at(Ints<V> index) const {
#if defined(__AVX512F__)
    if constexpr (V == 16) {
      return bits<Floats<V>>(
          _mm512_permutexvar_ps(bits<__m512i>(index), load<__m512>(halves)));
    }
#endif
#if defined(__AVX2__)
    if constexpr (V == 8) {
      const __m256i lanes = bits<__m256i>(index);
      const __m256 low = _mm256_permutevar8x32_ps(bits<__m256>(halves[0]), lanes);
      if constexpr (K < 4) return bits<Floats<V>>(low);
      const __m256 high = _mm256_permutevar8x32_ps(bits<__m256>(halves[1]), lanes);
      const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28));
      return bits<Floats<V>>(_mm256_blendv_ps(low, high, fourth));
    }
#endif
    Floats<V> found{};
    for (int i = 0; i < V; i++) {
      const int at = index[i] & ((1 << K) - 1);
      found[i] = halves[at / 8][at % 8];
    }
    return found;
  }
};

constexpr int kMostBits = 4;  // of planes that are read

// A matrix of rows of `width` elements. Its pointers are to the first expert, or to one.
struct Matrix {
  const char* codes;
  const char* scales;
  int64_t width;
  int64_t groups;         // scales per row; of `weigh`, rows per row of scales
  int64_t row_bytes;      // of codes
  int64_t row_scales;     // scales per row of scales
  int64_t expert_bytes;   // of codes
  int64_t expert_scales;  // bytes of scales
  // Of planes of bits.
  int64_t plane_bytes = 0;  // between the planes of a row
  int64_t kind_scales = 0;  // between a row's scales of one kind and those of the next
  int base = 0;             // planes of the base

  Matrix of(int64_t expert) const {
    Matrix m = *this;
    m.codes += expert * expert_bytes;
    m.scales += expert * expert_scales;
    return m;
  }
};

// Formats. `kPerLane` elements share a 32-bit lane, and elements of `kParts` parts of a row share a
// byte. A pass over the codes reads `kTogether` of the parts: with two, `pass` and
// `pass + kParts / 2`. `read` loads a unit, and `element` returns its vector i of part t, without
// the scale of its group, or, if not `kDeferred`, with that.

struct Unscaled {
  static constexpr int kParts = 1, kTogether = 1, kBits = 0, kScales = 0;
  static constexpr bool kDeferred = true;
  using Group = float;
  static Group group(const Matrix&, int64_t, int64_t) { return 1; }
  template <int V>
  static ROE_INLINE const char* read(const char* unit, int, int64_t) {
    return unit;
  }
};

struct Float32 : Unscaled {
  static constexpr int kPerLane = 1, kUnitBytesPerLane = 16;
  template <int V>
  static ROE_INLINE Floats<V> element(const char* unit, int, int i, int, Group) {
    return load<Floats<V>>(unit + 4 * V * i);
  }
};

struct BFloat16 : Unscaled {
  static constexpr int kPerLane = 2, kUnitBytesPerLane = 8;
  template <int V>
  static ROE_INLINE Floats<V> element(const char* unit, int, int i, int, Group) {
    const Ints<V> pair = load<Ints<V>>(unit + 4 * V * (i / 2));
    return bits<Floats<V>>(i % 2 ? pair & static_cast<int32_t>(0xffff0000) : pair << 16);
  }
};

inline float bfloat16_at(const void* data, int64_t i) {
  return bits<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
}

// One scale per group, `Own::scale(scales, i)`.
template <class Own>
struct Scaled {
  static constexpr int kPerLane = 4, kUnitBytesPerLane = 4;
  static constexpr int kParts = 1, kTogether = 1, kBits = 0, kScales = 1;
  static constexpr bool kDeferred = true;
  using Group = float;
  static float scale(const void* scales, int64_t i) { return bfloat16_at(scales, i); }
  static Group group(const Matrix& m, int64_t row, int64_t i) {
    return Own::scale(m.scales, row * m.row_scales + i);
  }
  // Writes a column's scales, each `stride` after the last.
  static void column(const Matrix& m, int64_t at, float* to, int64_t) {
    *to = Own::scale(m.scales, at);
  }
  template <int V>
  static ROE_INLINE Ints<V> read(const char* unit, int, int64_t) {
    return load<Ints<V>>(unit);
  }
  // Of signed bytes.
  template <int V>
  static ROE_INLINE Floats<V> element(Ints<V> lanes, int, int i, int, Group) {
    return __builtin_convertvector((lanes << (24 - 8 * i)) >> 24, Floats<V>);
  }
  // Returns a vector of elements with the scales of their columns.
  template <int V, class Lanes>
  static ROE_INLINE Floats<V> in_columns(
      Lanes lanes, int pass, int i, int t, const float* scales, int64_t) {
    return Own::template element<V>(lanes, pass, i, t, 1) * load<Floats<V>>(scales);
  }
};

struct Int8 : Scaled<Int8> {
#if defined(__AVX2__)
  // These CPUs have an instruction that loads and widens bytes, in their order.
  static constexpr int kPerLane = 1;
  template <int V>
  static ROE_INLINE const char* read(const char* unit, int, int64_t) {
    return unit;
  }
  template <int V>
  static ROE_INLINE Floats<V> element(const char* unit, int, int i, int, Group) {
    const char* codes = unit + V * i;
#if defined(__AVX512F__)
    if constexpr (V == 16) {
      const __m512i wide = _mm512_cvtepi8_epi32(load<__m128i>(codes));
      return __builtin_convertvector(bits<Ints<V>>(wide), Floats<V>);
    }
#endif
    if constexpr (V == 8) {
      const __m256i wide = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load<int64_t>(codes)));
      return __builtin_convertvector(bits<Ints<V>>(wide), Floats<V>);
    } else {
      Floats<V> found{};
      for (int k = 0; k < V; k++) found[k] = static_cast<int8_t>(codes[k]);
      return found;
    }
  }
#endif
};

struct Int4 : Scaled<Int4> {
  static constexpr int kParts = 2;
  template <int V>
  static ROE_INLINE Floats<V> element(Ints<V> lanes, int pass, int i, int, Group) {
    return __builtin_convertvector((lanes << (28 - 8 * i - 4 * pass)) >> 28, Floats<V>);
  }
};

struct MxFp4 : Scaled<MxFp4> {
  static constexpr int kParts = 2;
  // Half of 2^(exponent - 127), since elements are doubled; also right where that is subnormal.
  static float scale(const void* scales, int64_t i) {
    const uint32_t exponent = std::min<int>(static_cast<const uint8_t*>(scales)[i], 254);
    return bits<float>(exponent > 1 ? (exponent - 1) << 23 : 1u << (21 + exponent));
  }
  template <int V>
  static ROE_INLINE Ints<V> read(const char* unit, int pass, int64_t) {
    // Twice the FP4 values, 0 1 2 3 4 6 8 12 and their negatives, in all bytes at once.
    const Bytes<V> code = bits<Bytes<V>>(load<Ints<V>>(unit) >> (4 * pass));
    const Bytes<V> low = code & 7, negative = (code & 8) == 8, last = low > 6;
    const Bytes<V> twice = low - (low > 4) - (low > 5) - last - last - last;
    return bits<Ints<V>>((twice ^ negative) - negative);
  }
};

constexpr int32_t kLowOfNibbles = 0x11111111;

// The first kBits planes of a nested format: a weight is an offset, and what each bit adds.
template <int kPlanes>
struct Nested {
  static constexpr int kPerLane = 4, kUnitBytesPerLane = 4;
  static constexpr int kParts = 8, kTogether = 2, kBits = kPlanes, kScales = 1 + kBits;
  static constexpr bool kDeferred = false;
  using Group = Table;

  // Writes the offset, and what the bits add, the lowest first, each `stride` after the last.
  static ROE_INLINE void column(const Matrix& m, int64_t at, float* to, int64_t stride) {
    const float step = bfloat16_at(m.scales, at);
    float offset = bfloat16_at(m.scales, at + m.kind_scales);
    for (int plane = 0; plane < kBits; plane++) {
      float added = step * static_cast<float>(1 << std::max(0, m.base - 1 - plane));
      if (plane >= m.base) {  // the bits stand for -1 and 1
        const float size = bfloat16_at(m.scales, at + (2 + plane - m.base) * m.kind_scales);
        offset -= size;
        added = 2 * size;
      }
      to[(kBits - plane) * stride] = added;
    }
    to[0] = offset;
  }
  static ROE_INLINE Group group(const Matrix& m, int64_t row, int64_t i) {
    float scales[kScales];
    column(m, row * m.row_scales + i, scales, 1);
    return Table::of<kBits>(scales[0], scales + 1);
  }
  // Returns nibbles of bits: of part `pass`, and of part `pass + 4`.
  template <int V>
  static ROE_INLINE Ints<V> read(const char* unit, int pass, int64_t plane_bytes) {
    Ints<V> found{};
    ROE_UNROLL for (int plane = 0; plane < kBits; plane++) {
      const Ints<V> bits = load<Ints<V>>(unit + plane * plane_bytes);
      found = found << 1 | ((bits >> pass) & kLowOfNibbles);
    }
    return found;
  }
  template <int V>
  static ROE_INLINE Floats<V> element(Ints<V> lanes, int, int i, int t, const Group& group) {
    return group.at<kBits, V>(lanes >> (8 * i + 4 * t));
  }
  template <int V>
  static ROE_INLINE Floats<V> in_columns(
      Ints<V> lanes, int, int i, int t, const float* scales, int64_t stride) {
    Floats<V> found = load<Floats<V>>(scales);
    ROE_UNROLL for (int k = 0; k < kBits; k++) {
      const Ints<V> is_set = (lanes << (31 - 8 * i - 4 * t - k)) >> 31;
      found += bits<Floats<V>>(is_set & load<Ints<V>>(scales + (1 + k) * stride));
    }
    return found;
  }
};

// Calls `f` with every pass over the codes, as a constant if there are few.
template <class Format, class F>
ROE_INLINE void by_passes(F f) {
  constexpr int passes = Format::kParts / Format::kTogether;
  if constexpr (passes <= 2) {
    f(std::integral_constant<int, 0>());
    if constexpr (passes == 2) f(std::integral_constant<int, 1>());
  } else {
    for (int pass = 0; pass < passes; pass++) f(pass);
  }
}

// The part that pass `pass` reads as its part t.
template <class Format>
constexpr int part_of_pass(int pass, int t) {
  return pass + t * (Format::kParts / Format::kTogether);
}

// Calls `f` with the planes of a row that are read; once if there are none.
template <class Format, class F>
ROE_INLINE void by_planes(F f) {
  ROE_UNROLL for (int plane = 0; plane < std::max(1, Format::kBits); plane++) f(plane);
}

// Where element `i` of a row is in the order of vectors.
template <class Format, int V>
ROE_INLINE int64_t ordered(int64_t i) {
  constexpr int p = Format::kPerLane;
  return i / (p * V) * (p * V) + i % p * V + i % (p * V) / p;
}

template <class Format, int V>
void reorder(const float* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i++) to[ordered<Format, V>(i)] = from[i];
}

// Floats between the starts of rows of activations. Without the gap, rows of 4096 bytes would all
// need the same few lines of a core's cache.
constexpr int64_t kGap = 16;

// Bytes of codes between what is multiplied and what is fetched.
constexpr int64_t kAhead = 4096;

template <class Format, int V, int R, int N>
ROE_INLINE void dot_pass(
    const Matrix& m, int64_t row, int64_t apart, int pass, const float* const* x,
    Floats<V> (&sums)[R][N]) {
  constexpr int64_t unit = Format::kUnitBytesPerLane * V;
  constexpr int T = Format::kTogether;
  // Fewer sums would wait for one another.
  constexpr int K = R * N < 4 ? 4 : R * N < 8 ? 2 : 1;
  constexpr bool keeps = N > 2;  // by measurement, as the number of rows in `dot_rows`
  const int64_t width = m.width / Format::kParts, row_bytes = apart * m.row_bytes;
  const int64_t group = m.width / m.groups, run = std::gcd(group, width);
  const char* codes = m.codes + row * m.row_bytes;
  int64_t first[T];  // columns
  ROE_UNROLL for (int t = 0; t < T; t++) first[t] = part_of_pass<Format>(pass, t) * width;
  for (int64_t begin = 0; begin < width; begin += run) {
    typename Format::Group groups[R][T];
    ROE_UNROLL for (int r = 0; r < R; r++) {
      ROE_UNROLL for (int t = 0; t < T; t++) {
        groups[r][t] = Format::group(m, row + r * apart, (first[t] + begin) / group);
      }
    }
    Floats<V> parts[K][R][N] = {};
    for (int64_t c = begin; c < begin + run; c += 4 * V) {
      if (pass == 0 && (unit >= 64 || reinterpret_cast<uintptr_t>(codes) % 64 == 0)) {
        ROE_UNROLL for (int r = 0; r < R; r++) {
          by_planes<Format>([&](int plane) {
            for (int64_t b = 0; b < unit; b += 64) {
              __builtin_prefetch(
                  codes + r * row_bytes + kAhead + plane * m.plane_bytes + b, 0, 3);
            }
          });
        }
      }
      decltype(Format::template read<V>(codes, pass, 0)) lanes[R];
      ROE_UNROLL for (int r = 0; r < R; r++) {
        lanes[r] = Format::template read<V>(codes + r * row_bytes, pass, m.plane_bytes);
      }
      ROE_UNROLL for (int t = 0; t < T; t++) {
        ROE_UNROLL for (int i = 0; i < 4; i++) {
          Floats<V> w[R];
          ROE_UNROLL for (int r = 0; r < R; r++) {
            w[r] = kept<V, keeps>(Format::template element<V>(lanes[r], pass, i, t, groups[r][t]));
          }
          ROE_UNROLL for (int n = 0; n < N; n++) {
            const auto values = kept<V, keeps>(load<Floats<V>>(x[n] + first[t] + c + i * V));
            ROE_UNROLL for (int r = 0; r < R; r++) parts[i % K][r][n] += w[r] * values;
          }
        }
      }
      codes += unit;
    }
    ROE_UNROLL for (int r = 0; r < R; r++) {
      ROE_UNROLL for (int n = 0; n < N; n++) {
        Floats<V> part = parts[0][r][n];
        ROE_UNROLL for (int k = 1; k < K; k++) part += parts[k][r][n];
        if constexpr (Format::kDeferred) {
          sums[r][n] += groups[r][0] * part;
        } else {
          sums[r][n] += part;
        }
      }
    }
  }
}

// As all passes of `dot_pass`, of one row in a format with one scale per group: each code is loaded
// once for all parts, and short runs between scales have few sums to add up.
template <class Format, int V, int N>
ROE_INLINE void dot_row(
    const Matrix& m, int64_t row, const float* const* x, Floats<V> (&sums)[N]) {
  constexpr int64_t unit = Format::kUnitBytesPerLane * V;
  constexpr int P = Format::kParts, K = 2;
  const int64_t width = m.width / P, group = m.width / m.groups, run = std::gcd(group, width);
  const char* codes = m.codes + row * m.row_bytes;
  Floats<V> totals[P][N] = {};
  for (int64_t begin = 0; begin < width; begin += run) {
    Floats<V> parts[P][K][N] = {};
    for (int64_t c = begin; c < begin + run; c += 4 * V, codes += unit) {
      if (unit >= 64 || reinterpret_cast<uintptr_t>(codes) % 64 == 0) {
        for (int64_t b = 0; b < unit; b += 64) __builtin_prefetch(codes + kAhead + b, 0, 3);
      }
      ROE_UNROLL for (int p = 0; p < P; p++) {
        const auto lanes = Format::template read<V>(codes, p, 0);
        ROE_UNROLL for (int i = 0; i < 4; i++) {
          const Floats<V> w = Format::template element<V>(lanes, p, i, 0, 1);
          ROE_UNROLL for (int n = 0; n < N; n++) {
            parts[p][i % K][n] += w * load<Floats<V>>(x[n] + p * width + c + i * V);
          }
        }
      }
    }
    ROE_UNROLL for (int p = 0; p < P; p++) {
      const float scale = Format::group(m, row, (p * width + begin) / group);
      ROE_UNROLL for (int n = 0; n < N; n++) {
        totals[p][n] += scale * (parts[p][0][n] + parts[p][1][n]);
      }
    }
  }
  ROE_UNROLL for (int p = 0; p < P; p++) {
    ROE_UNROLL for (int n = 0; n < N; n++) sums[n] += totals[p][n];
  }
}

// Computes out[r][n] = row r . x[n] for R rows, each `apart` rows after the last. Row r of the result
// is `out + r * apart * stride`.
template <class Format, int V, int R, int N>
void dot(
    const Matrix& m, int64_t row, int64_t apart, const float* const* x, float* out,
    int64_t stride) {
  Floats<V> sums[R][N] = {};
  if constexpr (R == 1 && Format::kScales == 1) {
    dot_row<Format, V>(m, row, x, sums[0]);
  } else {
    by_passes<Format>([&](auto pass) { dot_pass<Format, V>(m, row, apart, pass, x, sums); });
  }
  for (int r = 0; r < R; r++) {
    for (int n = 0; n < N; n++) out[r * apart * stride + n] = total<V>(sums[r][n]);
  }
}

// Most tokens that are multiplied at a time; one with the narrow vectors of odd sizes.
constexpr int kTokens = 6;
template <int V>
constexpr int64_t most_tokens = V == 1 ? 1 : kTokens;

// Tokens of the next block, of those that are left.
template <int V>
int64_t block_of(int64_t left) {
  return std::min(left == 5 ? 3 : left, most_tokens<V>);
}

template <class Format, int V, int N>
void dot_rows(
    const Matrix& m, int64_t begin, int64_t end, const float* const* x, float* out,
    int64_t stride) {
  // Few bytes per weight are read fastest in order, by measurement.
  constexpr bool in_order = V == 1 || (N <= 2 && Format::kScales == 1);
  constexpr int rows = in_order ? 1 : N <= 2 || kRegisters > 16 ? 4 : N <= 4 ? 3 : 2;
  // Rows that are read together are far apart, so that each of a few streams goes on in memory.
  const int64_t apart = (end - begin) / rows;
  for (int64_t row = begin; row < begin + apart; row++) {
    dot<Format, V, rows, N>(m, row, apart, x, out + (row - begin) * stride, stride);
  }
  for (int64_t row = begin + rows * apart; row < end; row++) {
    for (int n = 0; n < N; n++) {
      dot<Format, V, 1, 1>(m, row, 1, x + n, out + (row - begin) * stride + n, stride);
    }
  }
}

// Adds the sum over rows of h[n][row] * matrix[row] to y[n], for the columns of `units` units of one
// pass. `codes` is the first unit of the first row.
template <class Format, int V, int N>
ROE_INLINE void weigh_pass(
    const char* codes, int64_t row_bytes, int64_t apart, int pass, int64_t rows, int64_t units,
    const float* const* h, const float* scales, float* const* y) {
  const int64_t distance = apart * row_bytes, next = apart > 1 ? row_bytes : rows * row_bytes;
  constexpr int64_t unit = Format::kUnitBytesPerLane * V;
  // As many sums as fit the registers.
  constexpr int Q = N * 4 + 5 <= kRegisters ? 4 : N * 2 + 3 <= kRegisters ? 2 : 1;
  for (int64_t u = 0; u < units; u++, codes += unit) {
    if (pass == 0 && (unit >= 64 || reinterpret_cast<uintptr_t>(codes) % 64 == 0)) {
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t b = 0; b < unit; b += 64) {
          __builtin_prefetch(codes + r * distance + next + b, 0, 2);
        }
      }
    }
    ROE_UNROLL for (int q = 0; q < 4; q += Q) {
      Floats<V> sums[N][Q] = {};
      for (int64_t r = 0; r < rows; r++) {
        const auto lanes = Format::template read<V>(codes + r * distance, pass, 0);
        ROE_UNROLL for (int i = 0; i < Q; i++) {
          const Floats<V> w = Format::template element<V>(lanes, pass, q + i, 0, 1);
          ROE_UNROLL for (int n = 0; n < N; n++) sums[n][i] += w * h[n][r * apart];
        }
      }
      ROE_UNROLL for (int i = 0; i < Q; i++) {
        const int64_t at = (pass * units + u) * 4 * V + (q + i) * V;
        ROE_UNROLL for (int n = 0; n < N; n++) {
          Floats<V> sum = sums[n][i];
          if constexpr (Format::kScales) sum *= load<Floats<V>>(scales + at);
          sum += load<Floats<V>>(y[n] + at);
          std::memcpy(y[n] + at, &sum, sizeof sum);
        }
      }
    }
  }
}

// Rows of planes whose bits make an index.
template <int V>
constexpr int kIndexed = V == 16 ? 4 : 3;

// As `weigh_pass`, of all passes over planes of bits: a plane's sum over a few rows is that of an
// index of their bits, in a table of sums of `h`, and is multiplied with the columns' scales.
template <int V, int N>
void weigh_planes(
    const Matrix& m, const char* codes, int planes, int64_t rows, int64_t units,
    const float* const* h, const float* scales, float* const* y) {
  constexpr int B = kIndexed<V>, kSteps = 24 / B;
  constexpr int64_t unit = 4 * V;
  // As many of a unit's eight vectors as have sums in registers.
  constexpr int Q = 8 * N + 6 <= kRegisters ? 8 : 4 * N + 4 <= kRegisters ? 4 : 2;
  const int64_t steps = (rows + B - 1) / B, stride = 8 * units * unit;
  Table tables[kSteps][N];
  float totals[N];
  ROE_UNROLL for (int n = 0; n < N; n++) {
    float of_rows[24] = {};
    std::copy_n(h[n], rows, of_rows);
    totals[n] = std::accumulate(of_rows, of_rows + rows, 0.0f);
    for (int64_t s = 0; s < steps; s++) tables[s][n] = Table::of<B>(0, of_rows + s * B);
  }
  int64_t offsets[24];
  for (int64_t r = 0; r < 24; r++) offsets[r] = std::min(r, rows - 1) * m.row_bytes;
  for (int64_t u = 0; u < units; u++) {
    for (int plane = 0; plane < planes; plane++) {
      const char* at = codes + plane * m.plane_bytes + u * unit;
      if (reinterpret_cast<uintptr_t>(at) % 64 == 0) {
        for (int64_t r = 0; r < rows; r++) {
          __builtin_prefetch(at + (rows + r) * m.row_bytes, 0, 2);
        }
      }
      const float* by_column = scales + (planes - plane) * stride;
      for (int pass = 0; pass < 4; pass++) {
        ROE_UNROLL for (int q = 0; q < 8; q += Q) {
          Floats<V> sums[N][Q] = {};
          for (int64_t s = 0; s < steps; s++) {
            Ints<V> index{};
            ROE_UNROLL for (int b = 0; b < B; b++) {
              const Ints<V> row = load<Ints<V>>(at + offsets[s * B + b]);
              index |= ((row >> pass) & kLowOfNibbles) << b;
            }
            ROE_UNROLL for (int i = 0; i < Q; i++) {
              const Ints<V> own = index >> ((q + i) % 4 * 8 + (q + i) / 4 * 4);
              ROE_UNROLL for (int n = 0; n < N; n++) {
                sums[n][i] += tables[s][n].template at<B, V>(own);
              }
            }
          }
          ROE_UNROLL for (int i = 0; i < Q; i++) {
            const int64_t part = pass + (q + i) / 4 * 4;
            const int64_t place = (part * units + u) * unit + (q + i) % 4 * V;
            ROE_UNROLL for (int n = 0; n < N; n++) {
              Floats<V> sum = sums[n][i] * load<Floats<V>>(by_column + place);
              if (plane == 0) sum += totals[n] * load<Floats<V>>(scales + place);
              sum += load<Floats<V>>(y[n] + place);
              std::memcpy(y[n] + place, &sum, sizeof sum);
            }
          }
        }
      }
    }
  }
}

// Calls `f` with the number of tokens as a constant.
template <int V, class F>
ROE_INLINE void by_tokens(int64_t count, F f) {
  const auto call = [&](auto n) {
    f(std::integral_constant<int, std::min<int>(n, most_tokens<V>)>());
  };
  switch (count) {
    case 1: return call(std::integral_constant<int, 1>());
    case 2: return call(std::integral_constant<int, 2>());
    case 3: return call(std::integral_constant<int, 3>());
    case 4: return call(std::integral_constant<int, 4>());
    default: return call(std::integral_constant<int, kTokens>());
  }
}

// Columns of a matrix whose rows are weighed: `units` units from `first` on, in each part.
template <class Format, int V>
struct Columns {
  int64_t first, units, width;

  int64_t size() const { return Format::kParts * units * 4 * V; }

  // Calls `f` with every column and its place in arrays in the order of vectors.
  template <class F>
  ROE_INLINE void each(F f) const {
    for (int part = 0; part < Format::kParts; part++) {
      const int64_t column = part * (width / Format::kParts) + first * 4 * V;
      const int64_t place = part * units * 4 * V;
      for (int64_t i = 0; i < units * 4 * V; i++) f(column + i, place + ordered<Format, V>(i));
    }
  }
};

// Reads the scales of a row's columns.
template <class Format, int V>
void read_scales(const Matrix& m, int64_t row, const Columns<Format, V>& columns, float* scales) {
  if constexpr (Format::kScales) {
    const int64_t first = row / m.groups * m.row_scales, size = columns.size();
    columns.each([&](int64_t column, int64_t i) {
      Format::column(m, first + column, scales + i, size);
    });
  }
}

// Computes y[n] += sum of h[n][i] * matrix row (begin + i) for `size` rows and all tokens. y holds
// the columns in the order of vectors; `scales` has room for `kScales` times as many values.
template <class Format, int V>
void weigh(
    const Matrix& m, int64_t begin, int64_t size, const Columns<Format, V>& columns,
    int64_t tokens, const float* const* h, float* const* y, float* scales) {
  constexpr int64_t unit = Format::kUnitBytesPerLane * V;
  // Adds `rows` rows from `row` on, each `apart` rows after the last.
  const auto add = [&](int64_t row, int64_t apart, int64_t rows) {
    const char* codes = m.codes + (begin + row) * m.row_bytes + columns.first * unit;
    for (int64_t n = 0, count; n < tokens; n += count) {
      const float* at[kTokens];
      count = block_of<V>(tokens - n);
      for (int64_t i = 0; i < count; i++) at[i] = h[n + i] + row;
      by_tokens<V>(count, [&](auto constant) {
        constexpr int N = constant;
        if constexpr (Format::kBits) {
          weigh_planes<V, N>(m, codes, Format::kBits, rows, columns.units, at, scales, y + n);
        } else {
          by_passes<Format>([&](auto pass) {
            weigh_pass<Format, V, N>(
                codes, m.row_bytes, apart, pass, rows, columns.units, at, scales, y + n);
          });
        }
      });
    }
  };
  // By measurement, few tokens are fastest with four streams, as in `dot_rows`, and more with rows in
  // order, since fewer sums are stored. Of planes, 24 rows are some indices in any width.
  const bool is_apart = !Format::kBits && tokens <= 2;
  const int64_t most = Format::kBits ? 24 : is_apart ? 4 : 8;
  for (int64_t row = 0, rows; row < size; row += rows) {
    rows = size - row;
    if constexpr (Format::kScales) {  // those with the same scales
      rows = std::min(rows, ((begin + row) / m.groups + 1) * m.groups - begin - row);
      read_scales(m, begin + row, columns, scales);
    }
    const int64_t apart = is_apart ? rows / most : 0;
    for (int64_t i = 0; i < apart; i++) add(row + i, apart, most);
    for (int64_t i = apart * most; i < rows; i += most) add(row + i, 1, std::min(most, rows - i));
  }
}

// Many tokens. A tile of weights is dequantized once, to float32, and stays in the core's second
// cache while all tokens pass, a block of which stays in the first. Tiles are as wide as a page of
// memory, since to look up pages takes long.

constexpr int64_t kTile = 32;          // neurons of an item
constexpr int64_t kTileRows = 32;      // of a tile
constexpr int64_t kTileColumns = 1024;
constexpr int64_t kChunk = 512;        // columns of a tile that a block of tokens passes at a time
constexpr int64_t kMost = 48;          // tokens that pass together

// Memory of a thread, kept for its later items.
struct Scratch {
  alignas(64) float weights[(kTileRows + kGap) * kTileColumns];
  alignas(64) float sums[kTileRows * kMost * kLanes];

  static Scratch& of_this_thread() {
    static thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
    return *scratch;
  }
};

// Whether tiles pay, by measurement.
template <class Format, int V>
bool is_many(int64_t tokens) {
  return V > 1 && tokens >= (Format::kScales ? 8 : 16);
}

// The size of the next of the fewest parts of `left`, of at most `most` each, that are about equal.
inline int64_t part_of(int64_t left, int64_t most) {
  const int64_t parts = (left + most - 1) / most;
  return (left + parts - 1) / parts;
}

// Calls `f` for blocks of tokens: with the number of tokens as a constant, and the first of them.
template <class F>
ROE_INLINE void by_blocks(int64_t tokens, F f) {
  for (int64_t n = 0, count; n < tokens; n += count) {
    count = part_of(tokens - n, kTokens);
    switch (count) {
      case 3: f(std::integral_constant<int, 3>(), n); break;
      case 4: f(std::integral_constant<int, 4>(), n); break;
      case 5: f(std::integral_constant<int, 5>(), n); break;
      default: f(std::integral_constant<int, 6>(), n);
    }
  }
}

template <int V>
ROE_INLINE void store(float* to, Floats<V> value) {
  std::memcpy(to, &value, sizeof value);
}

// Calls `f` with every unit of a row, and its number. Prefetches `ahead` bytes.
template <class Format, int V, class F>
ROE_INLINE void each_unit(
    const Matrix& m, const char* codes, int pass, int64_t units, int64_t ahead, F f) {
  constexpr int64_t unit = Format::kUnitBytesPerLane * V;
  for (int64_t u = 0; u < units; u++, codes += unit) {
    by_planes<Format>([&](int plane) {
      for (int64_t b = 0; b < unit; b += 64) {
        __builtin_prefetch(codes + ahead + plane * m.plane_bytes + b, 0, 3);
      }
    });
    f(u, Format::template read<V>(codes, pass, m.plane_bytes));
  }
}

// Bytes of the fewest rows that are at least a page.
inline int64_t bytes_ahead(int64_t row_bytes) {
  return (4095 + row_bytes) / row_bytes * row_bytes;
}

// Adds the products of R rows of weights with N tokens to `sums`.
template <int V, int R, int N>
ROE_INLINE void dot_chunk(
    const float* weights, int64_t stride, const float* const* x, int64_t first, int64_t size,
    Floats<V>* to, int64_t to_stride) {
  Floats<V> sums[R][N];
  const float* at[N];
  ROE_UNROLL for (int n = 0; n < N; n++) at[n] = x[n] + first;
  ROE_UNROLL for (int r = 0; r < R; r++) {
    ROE_UNROLL for (int n = 0; n < N; n++) sums[r][n] = to[r * to_stride + n];
  }
  for (int64_t c = 0; c < size; c += V) {
    Floats<V> w[R];
    ROE_UNROLL for (int r = 0; r < R; r++) {
      w[r] = kept<V>(load<Floats<V>>(weights + r * stride + c));
    }
    ROE_UNROLL for (int n = 0; n < N; n++) {
      const Floats<V> values = kept<V>(load<Floats<V>>(at[n] + c));
      ROE_UNROLL for (int r = 0; r < R; r++) sums[r][n] += w[r] * values;
    }
  }
  ROE_UNROLL for (int r = 0; r < R; r++) {
    ROE_UNROLL for (int n = 0; n < N; n++) to[r * to_stride + n] = sums[r][n];
  }
}

// Multiplies `size` columns of `rows` rows, from column `first` of the tokens on, with all tokens.
template <int V>
void dot_tile(
    const float* weights, int64_t stride, int64_t rows, const float* const* x, int64_t tokens,
    int64_t first, int64_t size, Floats<V>* sums) {
  constexpr int R = kRegisters > 16 ? 4 : 2;
  for (int64_t c = 0, chunk; c < size; c += chunk) {
    chunk = std::min(kChunk, size - c);
    by_blocks(tokens, [&](auto constant, int64_t n) {
      constexpr int N = constant;
      int64_t row = 0;
      for (; row + R <= rows; row += R) {
        dot_chunk<V, R, N>(
            weights + row * stride + c, stride, x + n, first + c, chunk, sums + row * tokens + n,
            tokens);
      }
      for (; row < rows; row++) {
        dot_chunk<V, 1, N>(
            weights + row * stride + c, stride, x + n, first + c, chunk, sums + row * tokens + n,
            tokens);
      }
    });
  }
}

// Computes out[r][n] = row r . x[n], as `dot`, for at most `kTileRows` rows and `kMost` tokens.
template <class Format, int V>
void dot_many(
    const Matrix& m, int64_t begin, int64_t rows, const float* const* x, int64_t tokens,
    float* out) {
  constexpr int64_t unit = Format::kUnitBytesPerLane * V, most = kTileColumns / (4 * V);
  Scratch& scratch = Scratch::of_this_thread();
  auto* sums = reinterpret_cast<Floats<V>*>(scratch.sums);
  std::fill_n(sums, rows * tokens, Floats<V>{});
  const int64_t width = m.width / Format::kParts, all = width / (4 * V);
  const int64_t group = m.width / m.groups, ahead = bytes_ahead(m.row_bytes);
  for (int64_t u = 0, units; u < all; u += units) {
    units = std::min(most, all - u);
    const int64_t size = units * 4 * V, stride = size + kGap;
    const char* codes = m.codes + begin * m.row_bytes + u * unit;
    const auto read_part = [&](int pass, int t) {
      const int64_t first = part_of_pass<Format>(pass, t) * width + u * 4 * V;
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0, run; i < units; i += run) {
          const int64_t column = first + i * 4 * V;
          float* to = scratch.weights + r * stride + i * 4 * V;
          run = units - i;
          if (Format::kScales) run = std::min(run, (group - column % group) / (4 * V));
          const auto of_group = Format::group(m, begin + r, column / group);
          each_unit<Format, V>(
              m, codes + r * m.row_bytes + i * unit, pass, run, ahead, [&](int64_t at, auto lanes) {
                ROE_UNROLL for (int i = 0; i < 4; i++) {
                  Floats<V> w = Format::template element<V>(lanes, pass, i, t, of_group);
                  if constexpr (Format::kScales && Format::kDeferred) w *= of_group;
                  store<V>(to + (4 * at + i) * V, w);
                }
              });
        }
      }
      dot_tile<V>(scratch.weights, stride, rows, x, tokens, first, size, sums);
    };
    by_passes<Format>([&](auto pass) {
      ROE_UNROLL for (int t = 0; t < Format::kTogether; t++) read_part(pass, t);
    });
  }
  for (int64_t i = 0; i < rows * tokens; i++) out[i] = total<V>(sums[i]);
}

// Computes out[r][n] = row r . x[n] for the first `count` of `tokens` tokens, and returns count.
template <class Format, int V>
int64_t dot_tokens(
    const Matrix& m, int64_t begin, int64_t rows, const float* const* x, int64_t tokens,
    float* out) {
  if (is_many<Format, V>(tokens)) {
    const int64_t count = part_of(tokens, kMost);
    for (int64_t r = 0; r < rows; r += kTileRows) {
      dot_many<Format, V>(
          m, begin + r, std::min(kTileRows, rows - r), x, count, out + r * count);
    }
    return count;
  }
  const int64_t count = block_of<V>(tokens);
  by_tokens<V>(count, [&](auto constant) {
    dot_rows<Format, V, constant>(m, begin, begin + rows, x, out, count);
  });
  return count;
}

// As `weigh`, for at most `kTileColumns` columns.
template <class Format, int V>
void weigh_many(
    const Matrix& m, int64_t begin, int64_t size, const Columns<Format, V>& columns,
    int64_t tokens, const float* const* h, float* const* y, float* scales) {
  constexpr int64_t unit = Format::kUnitBytesPerLane * V;
  constexpr int Q = kRegisters > 16 ? 4 : 2;
  float* const weights = Scratch::of_this_thread().weights;
  const int64_t panels = columns.size() / (Q * V), ahead = bytes_ahead(m.row_bytes);
  int64_t group = -1;
  for (int64_t row = 0, rows; row < size; row += rows) {
    rows = std::min(kTileRows, size - row);
    const int64_t stride = rows * Q * V + kGap;
    const char* codes = m.codes + (begin + row) * m.row_bytes + columns.first * unit;
    for (int64_t r = 0; r < rows; r++) {
      if (Format::kScales && (begin + row + r) / m.groups != group) {
        group = (begin + row + r) / m.groups;
        read_scales(m, begin + row + r, columns, scales);
      }
      by_passes<Format>([&](auto pass) {
        each_unit<Format, V>(
            m, codes + r * m.row_bytes, pass, columns.units, ahead, [&](int64_t u, auto lanes) {
              ROE_UNROLL for (int t = 0; t < Format::kTogether; t++) {
                const int64_t first = (part_of_pass<Format>(pass, t) * columns.units + u) * 4;
                ROE_UNROLL for (int i = 0; i < 4; i++) {
                  const int64_t at = first + i;
                  Floats<V> w;
                  if constexpr (Format::kScales) {
                    w = Format::template in_columns<V>(
                        lanes, pass, i, t, scales + at * V, columns.size());
                  } else {
                    w = Format::template element<V>(lanes, pass, i, t, 1);
                  }
                  store<V>(weights + at / Q * stride + (r * Q + at % Q) * V, w);
                }
              }
            });
      });
    }
    for (int64_t p = 0; p < panels; p++) {
      const float* panel = weights + p * stride;
      by_blocks(tokens, [&](auto constant, int64_t n) {
        constexpr int N = constant;
        Floats<V> sums[N][Q];
        const float* at[N];
        ROE_UNROLL for (int i = 0; i < N; i++) {
          at[i] = h[n + i] + row;
          const float* from = y[n + i] + p * Q * V;
          ROE_UNROLL for (int q = 0; q < Q; q++) sums[i][q] = load<Floats<V>>(from + q * V);
        }
        for (int64_t r = 0; r < rows; r++) {
          Floats<V> w[Q];
          ROE_UNROLL for (int q = 0; q < Q; q++) {
            w[q] = kept<V>(load<Floats<V>>(panel + (r * Q + q) * V));
          }
          ROE_UNROLL for (int i = 0; i < N; i++) {
            ROE_UNROLL for (int q = 0; q < Q; q++) sums[i][q] += w[q] * at[i][r];
          }
        }
        ROE_UNROLL for (int i = 0; i < N; i++) {
          float* to = y[n + i] + p * Q * V;
          ROE_UNROLL for (int q = 0; q < Q; q++) store<V>(to + q * V, sums[i][q]);
        }
      });
    }
  }
}

template <class Format, int V>
void weigh_tokens(
    const Matrix& m, int64_t begin, int64_t size, const Columns<Format, V>& columns,
    int64_t tokens, const float* const* h, float* const* y, float* scales) {
  if (is_many<Format, V>(tokens)) {
    weigh_many<Format, V>(m, begin, size, columns, tokens, h, y, scales);
  } else {
    weigh<Format, V>(m, begin, size, columns, tokens, h, y, scales);
  }
}

// Work in phases of independent items, which threads take one by one. Whoever starts it does all
// that no other thread has taken, so it ends even if no other thread ever comes.
class Job {
 public:
  struct Phase {
    int64_t count;
    std::function<void(int64_t)> run;
  };

  explicit Job(std::vector<Phase> phases) : phases_(std::move(phases)), state_(phases_.size()) {}

  void work(bool until_done) {
    for (size_t p = 0; p < phases_.size(); p++) {
      const int64_t count = phases_[p].count;
      for (int64_t i; (i = state_[p].next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        phases_[p].run(i);
        state_[p].done.fetch_add(1, std::memory_order_acq_rel);
      }
      if (!until_done && p + 1 == phases_.size()) return;
      for (int spins = 0; state_[p].done.load(std::memory_order_acquire) < count; spins++) {
        if (spins > 4096) std::this_thread::yield();
      }
    }
  }

 private:
  struct alignas(64) State {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::vector<Phase> phases_;
  std::vector<State> state_;
};

// `Pool` has `Schedule(function)` and `num_threads()`.
template <class Pool>
void run(Pool& pool, int64_t threads, std::vector<Job::Phase> phases) {
  int64_t most = 0;
  for (const auto& phase : phases) most = std::max(most, phase.count);
  const auto job = std::make_shared<Job>(std::move(phases));
  for (int64_t i = 1; i < std::min(threads, most); i++) {
    pool.Schedule([job] { job->work(false); });
  }
  job->work(true);
}

// Bytes of weights from which one more thread pays.
constexpr int64_t kThreadBytes = 1 << 16;

template <class Pool>
int64_t num_threads(Pool& pool, int64_t bytes) {
  return std::clamp<int64_t>(bytes / kThreadBytes, 1, std::max<int64_t>(1, pool.num_threads()));
}

// Of codes, or of one plane of them.
template <class Format>
int64_t bytes_per_row(int64_t width) {
  return width / Format::kParts / 4 * Format::kUnitBytesPerLane;
}

// Units of columns per item. With few tokens two items per thread, but segments of rows of at least
// 256 bytes; of planes, whose rows are short, of a cache line.
template <class Format, int V>
int64_t item_units(int64_t width, int64_t threads, int64_t tokens) {
  const int64_t all = width / Format::kParts / (4 * V);
  if (is_many<Format, V>(tokens)) {
    const int64_t most = kTileColumns / Format::kParts / (4 * V);
    return std::clamp<int64_t>((all + threads - 1) / threads, 1, most);
  }
  if (threads == 1) return all;
  const int64_t segment = Format::kBits ? 64 : 256;
  const int64_t least = std::max<int64_t>(1, segment / (Format::kUnitBytesPerLane * V));
  return std::min(all, std::max(least, (all + 2 * threads - 1) / (2 * threads)));
}

// With up to so many tokens, rows that are weighed are read in order, which is fastest, in blocks.
// Each has sums of its own, which are added in the order of rows, for any number of threads.
constexpr int64_t kFewTokens = 4;

struct RowBlocks {
  int64_t all, rows, count;  // rows, of a block; blocks

  explicit RowBlocks(int64_t all)
      : all(all),
        rows(std::max<int64_t>(256, (all / 8 + 127) / 128 * 128)),
        count((all + rows - 1) / rows) {}

  int64_t size(int64_t block) const { return std::min(rows, all - block * rows); }

  // Adds the sums of all blocks, in the order of vectors and each `stride` after the last, to `y`.
  template <class Format, int V>
  void add(
      const Columns<Format, V>& columns, const float* sums, int64_t stride, float* y) const {
    for (int64_t b = 0; b < count; b++, sums += stride) {
      columns.each([&](int64_t column, int64_t i) { y[column] += sums[i]; });
    }
  }
};

struct Activation {
  float limit;  // infinite: SwiGLU without a clamp
  float alpha;
  bool clamped;
  bool round;  // hidden values to bfloat16
};

template <int V>
ROE_INLINE Floats<V> select(Ints<V> mask, Floats<V> yes, Floats<V> no) {
  return bits<Floats<V>>((mask & bits<Ints<V>>(yes)) | (~mask & bits<Ints<V>>(no)));
}

template <int V>
ROE_INLINE Floats<V> exponential(Floats<V> x) {
  const Floats<V> most = Floats<V>{} + 88.0f, least = Floats<V>{} - 87.0f;
  x = select<V>(x < most, x, most);
  x = select<V>(x > least, x, least);
  const Floats<V> shifted = x * 1.44269504f + 12582912.0f;
  const Floats<V> n = shifted - 12582912.0f;
  const Floats<V> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats<V> p = Floats<V>{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints<V> exponent = (bits<Ints<V>>(shifted) - 0x4b400000 + 127) << 23;
  return p * bits<Floats<V>>(exponent);
}

template <int V>
ROE_INLINE Floats<V> to_bfloat16(Floats<V> x) {
  typedef uint32_t Unsigned __attribute__((vector_size(4 * V)));
  const Unsigned raw = bits<Unsigned>(x);
  const Unsigned rounded = (raw + 0x7fff + ((raw >> 16) & 1)) & 0xffff0000;
  return select<V>(x == x, bits<Floats<V>>(rounded), x);
}

template <int V>
ROE_INLINE Floats<V> activate(const Activation& a, Floats<V> gate, Floats<V> up) {
  Floats<V> hidden;
  if (a.clamped) {
    const Floats<V> most = Floats<V>{} + a.limit;
    gate = select<V>(gate > most, most, gate);
    up = select<V>(up > most, most, up);
    up = select<V>(up < -most, -most, up);
    hidden = (up + 1) * gate / (1 + exponential<V>(-a.alpha * gate));
  } else {
    hidden = gate / (1 + exponential<V>(-gate)) * up;
  }
  return a.round ? to_bfloat16<V>(hidden) : hidden;
}

struct Experts {
  int64_t num_tokens, num_choices, num_experts, d_model, d_expert;
  int64_t layer;
  int64_t bits;           // planes that are read of a nested format
  const int32_t* bits_of; // planes that each of the layer's experts has; null: all
  Matrix gate_up, down;
  const void* gate_up_bias;  // null without one; of the format's unquantized dtype
  const void* down_bias;
  bool bias_is_bfloat16;
  const float* x;
  const int32_t* indices;
  const float* gates;
  Activation activation;
  float* y;
  float* hidden;     // [num_tokens * num_choices, d_expert], scratch
  float* reordered;  // [num_tokens, d_model + kGap], scratch
};

inline float bias_at(const void* bias, bool is_bfloat16, int64_t i) {
  return is_bfloat16 ? bfloat16_at(bias, i) : static_cast<const float*>(bias)[i];
}

// Calls `f` with the format in which an expert is read: of nested formats, with as many planes as it
// has, at most those that are read.
template <class Format, class F>
void by_expert(const Experts& e, int64_t expert, F f) {
  if constexpr (Format::kBits == 0) {
    return f(Format());
  } else {
    switch (e.bits_of ? std::min<int64_t>(e.bits, e.bits_of[expert]) : e.bits) {
      case 1: return f(Nested<1>());
      case 2: return f(Nested<2>());
      case 3: return f(Nested<3>());
      default: return f(Nested<4>());
    }
  }
}

template <class Format, int V, class Pool>
void run_experts(Pool& pool, const Experts& e) {
  const int64_t n = e.num_tokens, a = e.num_choices, d = e.d_model, f = e.d_expert;
  // Pairs sorted by expert; pairs with gate zero are left out.
  std::vector<int64_t> ends(e.num_experts + 1, 0);
  std::vector<int64_t> active, tokens(n * a);
  std::vector<float> gates(n * a);
  const auto counts = [&](int64_t p) {
    return e.gates[p] != 0 && e.indices[p] >= 0 && e.indices[p] < e.num_experts;
  };
  for (int64_t p = 0; p < n * a; p++) {
    if (counts(p)) ends[e.indices[p] + 1]++;
  }
  for (int64_t i = 0; i < e.num_experts; i++) {
    if (ends[i + 1]) active.push_back(i);
    ends[i + 1] += ends[i];
  }
  std::vector<int64_t> next(ends.begin(), ends.end() - 1);
  for (int64_t p = 0; p < n * a; p++) {
    if (!counts(p)) continue;
    const int64_t place = next[e.indices[p]]++;
    tokens[place] = p / a;
    gates[place] = e.gates[p];
  }
  std::vector<const float*> x(n * a), hidden(n * a);
  const int64_t stride = d + kGap;
  for (int64_t i = 0; i < n; i++) reorder<Format, V>(e.x + i * d, e.reordered + i * stride, d);
  for (int64_t p = 0; p < ends.back(); p++) {
    x[p] = e.reordered + tokens[p] * stride;
    hidden[p] = e.hidden + p * f;
  }
  const int64_t bytes = 3 * f * std::max<int64_t>(1, e.bits) * bytes_per_row<Format>(d);
  const int64_t threads = num_threads(pool, bytes * static_cast<int64_t>(active.size()));

  const int64_t tiles = (f + kTile - 1) / kTile;
  const auto project = [&](int64_t item) {
    const int64_t expert = active[item / tiles], first = item % tiles * kTile;
    const int64_t size = std::min(kTile, f - first);
    const int64_t index = e.layer * e.num_experts + expert;
    const Matrix gate_up = e.gate_up.of(index);
    float out[2 * kTile * kMost];
    float projected[2][kTile] = {};
    for (int64_t p = ends[expert], count; p < ends[expert + 1]; p += count) {
      by_expert<Format>(e, expert, [&](auto format) {
        using Own = decltype(format);
        const int64_t left = ends[expert + 1] - p;
        count = dot_tokens<Own, V>(gate_up, 2 * first, 2 * size, &x[p], left, out);
      });
      for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < size; j++) {
          for (int c = 0; c < 2; c++) {
            float value = out[(2 * j + c) * count + i];
            if (e.gate_up_bias) {
              const int64_t at = 2 * (index * f + first + j) + c;
              value += bias_at(e.gate_up_bias, e.bias_is_bfloat16, at);
            }
            projected[c][j] = value;
          }
        }
        float* to = e.hidden + (p + i) * f + first;
        for (int64_t j = 0; j < kTile; j += V) {
          const Floats<V> h = activate<V>(
              e.activation, load<Floats<V>>(projected[0] + j), load<Floats<V>>(projected[1] + j));
          store<V>(projected[0] + j, gates[p + i] * h);
        }
        std::copy_n(projected[0], size, to);
      }
    }
  };

  const int64_t all = d / Format::kParts / (4 * V);
  if (n <= kFewTokens) {
    const RowBlocks blocks(f);
    std::vector<float> sums(ends.back() * blocks.count * stride);
    const Columns<Format, V> columns{0, all, d};
    const auto weigh_block = [&](int64_t item) {
      const int64_t expert = active[item / blocks.count], b = item % blocks.count;
      std::vector<float> scales(Format::kScales * d);
      std::vector<const float*> from;
      std::vector<float*> to;
      for (int64_t p = ends[expert]; p < ends[expert + 1]; p++) {
        from.push_back(hidden[p] + b * blocks.rows);
        to.push_back(sums.data() + (p * blocks.count + b) * stride);
      }
      by_expert<Format>(e, expert, [&](auto format) {
        using Own = decltype(format);
        weigh<Own, V>(
            e.down.of(e.layer * e.num_experts + expert), b * blocks.rows, blocks.size(b),
            Columns<Own, V>{0, all, d}, from.size(), from.data(), to.data(), scales.data());
      });
    };
    const auto add = [&](int64_t t) {
      std::fill_n(e.y + t * d, d, 0.0f);
      for (const int64_t expert : active) {
        for (int64_t p = ends[expert]; p < ends[expert + 1]; p++) {
          if (tokens[p] != t) continue;
          blocks.add(columns, sums.data() + p * blocks.count * stride, stride, e.y + t * d);
          const int64_t first = (e.layer * e.num_experts + expert) * d;
          for (int64_t i = 0; e.down_bias && i < d; i++) {
            e.y[t * d + i] += gates[p] * bias_at(e.down_bias, e.bias_is_bfloat16, first + i);
          }
        }
      }
    };
    const auto count = static_cast<int64_t>(active.size());
    return run(
        pool, threads, {{count * tiles, project}, {count * blocks.count, weigh_block}, {n, add}});
  }
  int64_t most = 0;
  for (const int64_t expert : active) most = std::max(most, ends[expert + 1] - ends[expert]);
  const int64_t units = item_units<Format, V>(d, threads, most);
  const int64_t segments = (all + units - 1) / units;
  const auto segment = [&](int64_t i) {
    return Columns<Format, V>{i * units, std::min(units, all - i * units), d};
  };
  const auto weigh_expert = [&](int64_t expert, const Columns<Format, V>& columns,
                                float* const* y, float* scales) {
    const int64_t begin = ends[expert], end = ends[expert + 1];
    const int64_t index = e.layer * e.num_experts + expert;
    by_expert<Format>(e, expert, [&](auto format) {
      using Own = decltype(format);
      const Columns<Own, V> own{columns.first, columns.units, columns.width};
      weigh_tokens<Own, V>(
          e.down.of(index), 0, f, own, end - begin, &hidden[begin], y + begin, scales);
    });
    for (int64_t p = begin; e.down_bias && p < end; p++) {
      columns.each([&](int64_t column, int64_t i) {
        y[p][i] += gates[p] * bias_at(e.down_bias, e.bias_is_bfloat16, index * d + column);
      });
    }
  };
  const auto project_back = [&](int64_t item) {
    const auto columns = segment(item);
    const int64_t size = columns.size(), stride = size + kGap;
    std::vector<float> sums(n * stride), scales(Format::kScales * size);
    std::vector<float*> y(ends.back());
    for (int64_t p = 0; p < ends.back(); p++) y[p] = sums.data() + tokens[p] * stride;
    for (const int64_t expert : active) weigh_expert(expert, columns, y.data(), scales.data());
    for (int64_t t = 0; t < n; t++) {
      columns.each([&](int64_t column, int64_t i) { e.y[t * d + column] = sums[t * stride + i]; });
    }
  };
  run(pool, threads,
      {{static_cast<int64_t>(active.size()) * tiles, project}, {segments, project_back}});
}

// Computes y[n][r] = x[n] . matrix row (first + r), for `rows` rows.
template <class Format, int V, class Pool>
void run_project(
    Pool& pool, const Matrix& m, int64_t first, int64_t rows, int64_t tokens, const float* x,
    float* reordered, float* y) {
  const int64_t d = m.width;
  const int64_t stride = d + kGap;
  std::vector<const float*> at(tokens);
  for (int64_t i = 0; i < tokens; i++) {
    reorder<Format, V>(x + i * d, reordered + i * stride, d);
    at[i] = reordered + i * stride;
  }
  const int64_t threads = num_threads(pool, rows * bytes_per_row<Format>(d));
  run(pool, threads, {{(rows + 2 * kTile - 1) / (2 * kTile), [&](int64_t item) {
        const int64_t begin = item * 2 * kTile, end = std::min(rows, begin + 2 * kTile);
        float out[2 * kTile * kMost];
        for (int64_t n = 0, count; n < tokens; n += count) {
          count = dot_tokens<Format, V>(m, first + begin, end - begin, &at[n], tokens - n, out);
          for (int64_t i = 0; i < count; i++) {
            for (int64_t r = begin; r < end; r++) {
              y[(n + i) * rows + r] = out[(r - begin) * count + i];
            }
          }
        }
      }}});
}

// Computes y[n] = sum over r of x[n][r] * matrix row (first + r), for `rows` rows.
template <class Format, int V, class Pool>
void run_project_back(
    Pool& pool, const Matrix& m, int64_t first, int64_t rows, int64_t tokens, const float* x,
    float* y) {
  const int64_t d = m.width, all = d / Format::kParts / (4 * V);
  const int64_t threads = num_threads(pool, rows * bytes_per_row<Format>(d));
  const int64_t units = item_units<Format, V>(d, threads, tokens);
  if (tokens <= kFewTokens) {
    const RowBlocks blocks(rows);
    const int64_t stride = d + kGap;
    const Columns<Format, V> columns{0, all, d};
    std::vector<float> sums(tokens * blocks.count * stride);
    const auto weigh_block = [&](int64_t b) {
      const float* from[kFewTokens];
      float* to[kFewTokens];
      for (int64_t t = 0; t < tokens; t++) {
        from[t] = x + t * rows + b * blocks.rows;
        to[t] = sums.data() + (t * blocks.count + b) * stride;
      }
      std::vector<float> scales(Format::kScales * d);
      weigh<Format, V>(
          m, first + b * blocks.rows, blocks.size(b), columns, tokens, from, to, scales.data());
    };
    const auto add = [&](int64_t t) {
      std::fill_n(y + t * d, d, 0.0f);
      blocks.add(columns, sums.data() + t * blocks.count * stride, stride, y + t * d);
    };
    return run(pool, threads, {{blocks.count, weigh_block}, {tokens, add}});
  }
  std::vector<const float*> from(tokens);
  for (int64_t t = 0; t < tokens; t++) from[t] = x + t * rows;
  run(pool, threads, {{(all + units - 1) / units, [&](int64_t item) {
        const Columns<Format, V> columns{item * units, std::min(units, all - item * units), d};
        const int64_t size = columns.size(), stride = size + kGap;
        std::vector<float> sums(tokens * stride), scales(Format::kScales * size);
        std::vector<float*> to(tokens);
        for (int64_t t = 0; t < tokens; t++) to[t] = sums.data() + t * stride;
        weigh_tokens<Format, V>(
            m, first, rows, columns, tokens, from.data(), to.data(), scales.data());
        for (int64_t t = 0; t < tokens; t++) {
          columns.each([&](int64_t column, int64_t i) { y[t * d + column] = to[t][i]; });
        }
      }}});
}

// A narrower width for runs of weights, of one scale, that the widest vectors do not divide.
constexpr int kFewerLanes = kLanes == 16 ? 8 : 1;

template <class F>
void by_lanes(int64_t run, F f) {
  if (run % (4 * kLanes) == 0) return f(std::integral_constant<int, kLanes>());
  if (run % (4 * kFewerLanes) == 0) return f(std::integral_constant<int, kFewerLanes>());
  f(std::integral_constant<int, 1>());
}

enum class Kind { kFloat32, kBFloat16, kInt8, kInt4, kMxFp4, kNested };

// Calls `f` with a format that is not nested.
template <class F>
void by_plain_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::kBFloat16: return f(BFloat16());
    case Kind::kInt8: return f(Int8());
    case Kind::kInt4: return f(Int4());
    case Kind::kMxFp4: return f(MxFp4());
    default: f(Float32());
  }
}

template <class F>
void by_kind(Kind kind, F f) {
  if (kind == Kind::kNested) return f(Nested<kMostBits>());
  by_plain_kind(kind, f);
}

template <class Pool>
void project(
    Pool& pool, Kind kind, const Matrix& m, int64_t first, int64_t rows, int64_t tokens,
    const float* x, float* reordered, float* y) {
  by_plain_kind(kind, [&](auto format) {
    using Format = decltype(format);
    by_lanes(std::gcd(m.width / m.groups, m.width / Format::kParts), [&](auto lanes) {
      run_project<Format, lanes>(pool, m, first, rows, tokens, x, reordered, y);
    });
  });
}

template <class Pool>
void project_back(
    Pool& pool, Kind kind, const Matrix& m, int64_t first, int64_t rows, int64_t tokens,
    const float* x, float* y) {
  by_plain_kind(kind, [&](auto format) {
    using Format = decltype(format);
    by_lanes(m.width / Format::kParts, [&](auto lanes) {
      run_project_back<Format, lanes>(pool, m, first, rows, tokens, x, y);
    });
  });
}

template <class Pool>
void experts(Pool& pool, Kind kind, const Experts& e) {
  by_kind(kind, [&](auto format) {
    using Format = decltype(format);
    const int64_t run = std::gcd(e.d_model / e.gate_up.groups, e.d_model / Format::kParts);
    by_lanes(run, [&](auto lanes) { run_experts<Format, lanes>(pool, e); });
  });
}

}  // namespace roe

#ifdef ROE_JAX_FFI
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats2 = ffi::Buffer<ffi::F32>;

const char* data_or_null(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() ? static_cast<const char*>(buffer.untyped_data()) : nullptr;
}

// A matrix `[experts, ..., width]` with its codes, whose last axis holds all planes of a row.
roe::Matrix matrix(const ffi::AnyBuffer& codes, int64_t width) {
  roe::Matrix m{};
  m.codes = data_or_null(codes);
  m.width = width;
  m.groups = 1;
  m.row_bytes = codes.dimensions().back() * ffi::ByteWidth(codes.element_type());
  m.expert_bytes = codes.size_bytes() / codes.dimensions()[0];
  return m;
}

// `stored`: planes of a nested format, with `base` in its base; 0 of others.
void set_scales(
    roe::Matrix& m, const ffi::AnyBuffer& scales, int64_t base, int64_t stored, bool by_row,
    int64_t rows) {
  if (!scales.element_count()) return;
  const int64_t kinds = stored ? 2 + stored - base : 1;
  m.scales = data_or_null(scales);
  m.row_scales = scales.dimensions().back();
  m.expert_scales = scales.size_bytes() / scales.dimensions()[0];
  m.kind_scales = m.row_scales / kinds;
  m.groups = by_row ? m.kind_scales : rows / static_cast<int64_t>(scales.dimensions()[1]);
  m.base = base;
  if (stored) m.plane_bytes = m.row_bytes / stored;
}

ffi::Error Experts(
    ffi::ThreadPool pool, ffi::Buffer<ffi::S32> layer, Floats2 x, ffi::Buffer<ffi::S32> indices,
    Floats2 gates, ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer down,
    ffi::AnyBuffer down_scales, ffi::AnyBuffer gate_up_bias, ffi::AnyBuffer down_bias,
    ffi::Buffer<ffi::S32> bits_of,
    ffi::Result<Floats2> y, ffi::Result<Floats2> hidden, ffi::Result<Floats2> reordered,
    int64_t kind, int64_t base, int64_t bits, int64_t stored, int64_t num_experts, float limit,
    float alpha, bool clamped, bool round) {
  roe::Experts e;
  e.num_tokens = x.dimensions()[0];
  e.num_choices = indices.dimensions()[1];
  e.num_experts = num_experts;
  e.d_model = x.dimensions()[1];
  e.d_expert = hidden->dimensions()[1];
  e.layer = layer.typed_data()[0];
  e.bits = bits;
  e.bits_of = bits_of.element_count() ? bits_of.typed_data() : nullptr;
  e.gate_up = matrix(gate_up, e.d_model);
  set_scales(e.gate_up, gate_up_scales, base, stored, true, 0);
  e.down = matrix(down, e.d_model);
  set_scales(e.down, down_scales, base, stored, false, e.d_expert);
  e.gate_up_bias = data_or_null(gate_up_bias);
  e.down_bias = data_or_null(down_bias);
  e.bias_is_bfloat16 = gate_up_bias.element_type() == ffi::U16;
  e.x = x.typed_data();
  e.indices = indices.typed_data();
  e.gates = gates.typed_data();
  e.activation = {limit, alpha, clamped, round};
  e.y = y->typed_data();
  e.hidden = hidden->typed_data();
  e.reordered = reordered->typed_data();
  roe::experts(pool, static_cast<roe::Kind>(kind), e);
  return ffi::Error::Success();
}

// `index` counts matrices of as many rows as are used.
ffi::Error Project(
    ffi::ThreadPool pool, ffi::Buffer<ffi::S32> index, Floats2 x, ffi::AnyBuffer codes,
    ffi::AnyBuffer scales, ffi::Result<Floats2> y, ffi::Result<Floats2> reordered, int64_t kind) {
  const int64_t rows = y->dimensions()[1];
  roe::Matrix m = matrix(codes, x.dimensions()[1]);
  set_scales(m, scales, 0, 0, true, 0);
  roe::project(
      pool, static_cast<roe::Kind>(kind), m, index.typed_data()[0] * rows, rows,
      x.dimensions()[0], x.typed_data(), reordered->typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error ProjectBack(
    ffi::ThreadPool pool, ffi::Buffer<ffi::S32> index, Floats2 x, ffi::AnyBuffer codes,
    ffi::AnyBuffer scales, ffi::Result<Floats2> y, int64_t kind) {
  const int64_t rows = x.dimensions()[1];
  roe::Matrix m = matrix(codes, y->dimensions()[1]);
  set_scales(m, scales, 0, 0, false, rows);
  roe::project_back(
      pool, static_cast<roe::Kind>(kind), m, index.typed_data()[0] * rows, rows,
      x.dimensions()[0], x.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    roe_jax_experts, Experts,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<Floats2>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<Floats2>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Ret<Floats2>()
        .Ret<Floats2>()
        .Ret<Floats2>()
        .Attr<int64_t>("kind")
        .Attr<int64_t>("base")
        .Attr<int64_t>("bits")
        .Attr<int64_t>("stored")
        .Attr<int64_t>("num_experts")
        .Attr<float>("limit")
        .Attr<float>("alpha")
        .Attr<bool>("clamped")
        .Attr<bool>("round"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    roe_jax_project, Project,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<Floats2>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Ret<Floats2>()
        .Ret<Floats2>()
        .Attr<int64_t>("kind"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    roe_jax_project_back, ProjectBack,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::S32>>()
        .Arg<Floats2>()
        .Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>()
        .Ret<Floats2>()
        .Attr<int64_t>("kind"));

#endif  // ROE_JAX_FFI
