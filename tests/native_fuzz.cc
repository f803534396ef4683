// Runs the native kernels on random shapes: for sanitizers, and against sums in double precision.
//
//   g++ -std=c++17 -O1 -g -march=native -fsanitize=address,undefined -pthread -I roe_jax/native
//       tests/native_fuzz.cc -o fuzz && ./fuzz 300
//   (and with -fsanitize=thread; for ARM with a cross compiler, -static, under qemu-aarch64)
//
// All arrays are exactly as large as the kernels may read or write.

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>

#include "kernels.cc"

namespace {

struct Pool {
  int64_t threads;
  std::mutex mutex;
  std::vector<std::thread> started;

  template <class F>
  void Schedule(F f) {
    const std::lock_guard<std::mutex> lock(mutex);
    started.emplace_back(f);
  }
  int64_t num_threads() const { return threads; }
  ~Pool() {
    for (auto& thread : started) thread.join();
  }
};

std::mt19937 generator(0);

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

std::vector<float> normals(int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& v : values) v = normal(generator);
  return values;
}

// A matrix as it is stored, and its values.
struct Stored {
  std::vector<char> codes, scales;
  std::vector<double> values;
  // Of a nested format: planes of the base and of all, and values by the planes that are read.
  int base = 0, planes = 0;
  std::vector<std::vector<double>> by_planes;

  const std::vector<double>& read(int64_t count) const {
    return planes ? by_planes[count] : values;
  }
};

constexpr double kFp4[] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6};

// Groups run along rows of `width` (down = 1), or over `down` rows of one column.
Stored stored(roe::Kind kind, int64_t rows, int64_t width, int64_t along, int64_t down) {
  Stored m;
  m.values.resize(rows * width);
  const bool scaled = kind >= roe::Kind::kInt8, exponents = kind == roe::Kind::kMxFp4;
  const int64_t groups = width / along, count = scaled ? rows / down * groups : 0;
  std::vector<double> scales(count);
  m.scales.resize(count * (exponents ? 1 : 2));
  for (int64_t i = 0; i < count; i++) {
    const int exponent = between(120, 124);
    scales[i] = std::ldexp(1.0, exponent - 127);
    const uint16_t as_bfloat16 = exponent << 7;
    if (exponents) {
      m.scales[i] = static_cast<char>(exponent);
    } else {
      std::memcpy(&m.scales[2 * i], &as_bfloat16, 2);
    }
  }
  const int64_t bytes = kind == roe::Kind::kFloat32 ? 4 : kind == roe::Kind::kBFloat16 ? 2 : 1;
  m.codes.assign(rows * (kind >= roe::Kind::kInt4 ? width / 2 : bytes * width), 0);
  for (int64_t i = 0; i < rows * width; i++) {
    const int64_t row = i / width, c = i % width;
    double value;
    if (bytes > 1) {
      const uint32_t raw = roe::bits<uint32_t>(normals(1)[0]) & 0xffff0000;
      value = roe::bits<float>(raw);
      std::memcpy(&m.codes[i * bytes], reinterpret_cast<const char*>(&raw) + 4 - bytes, bytes);
    } else if (kind == roe::Kind::kInt8) {
      const int8_t code = between(-128, 127);  // `char` has no sign on ARM
      m.codes[i] = code, value = code;
    } else {
      const int code = between(0, 15), high = c >= width / 2;
      m.codes[row * (width / 2) + c % (width / 2)] |= code << (4 * high);
      value = exponents ? kFp4[code] : (code ^ 8) - 8;
    }
    m.values[i] = scaled ? value * scales[row / down * groups + c / along] : value;
  }
  return m;
}

double put_bfloat16(std::vector<char>& to, int64_t i) {
  const uint16_t raw = roe::bits<uint32_t>(normals(1)[0]) >> 16;
  std::memcpy(&to[2 * i], &raw, 2);
  return roe::bfloat16_at(&raw, 0);
}

// As `stored`, of random planes of bits. A row's scales are those of a kind after the other.
Stored nested(int64_t rows, int64_t width, int64_t along, int64_t down, int base, int planes) {
  Stored m;
  m.base = base, m.planes = planes;
  const int64_t groups = width / along, plane_bytes = width / 8, kinds = 2 + planes - base;
  std::vector<double> scales(rows / down * kinds * groups);
  m.scales.resize(2 * scales.size());
  for (size_t i = 0; i < scales.size(); i++) scales[i] = put_bfloat16(m.scales, i);
  m.codes.resize(rows * planes * plane_bytes);
  for (char& c : m.codes) c = static_cast<char>(between(0, 255));
  m.by_planes.assign(planes + 1, std::vector<double>(rows * width));
  for (int64_t i = 0; i < rows * width; i++) {
    const int64_t row = i / width, c = i % width;
    const auto scale = [&](int kind) {
      return scales[(row / down * kinds + kind) * groups + c / along];
    };
    double value = scale(1);
    for (int p = 0; p < planes; p++) {
      const uint8_t byte = m.codes[(row * planes + p) * plane_bytes + c % plane_bytes];
      const int bit = byte >> (c / plane_bytes) & 1;
      value += p < base ? bit * scale(0) * (1 << (base - 1 - p)) : (2 * bit - 1) * scale(2 + p - base);
      m.by_planes[p + 1][i] = value;
    }
  }
  return m;
}

// `groups`: see `roe::Matrix`; the matrices of `experts` lie one after the other.
roe::Matrix matrix(
    const Stored& m, int64_t experts, int64_t rows, int64_t width, int64_t groups,
    int64_t row_scales) {
  roe::Matrix made{};
  made.codes = m.codes.data(), made.scales = m.scales.data();
  made.width = width, made.groups = groups;
  made.row_bytes = m.codes.size() / (experts * rows);
  made.row_scales = made.kind_scales = row_scales;
  if (m.planes) {
    made.row_scales *= 2 + m.planes - m.base;
    made.plane_bytes = made.row_bytes / m.planes, made.base = m.base;
  }
  made.expert_bytes = m.codes.size() / experts, made.expert_scales = m.scales.size() / experts;
  return made;
}

void expect(const std::vector<float>& found, const std::vector<double>& right, const char* what) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < right.size(); i++) {
    largest = std::max(largest, std::abs(right[i]));
    error = std::max(error, std::abs(found[i] - right[i]));
  }
  if (!(error <= 1e-5 * largest)) {
    std::printf("%s: error %g of %g\n", what, error, largest);
    std::exit(1);
  }
}

void experts(roe::Kind kind) {
  const bool packed = kind >= roe::Kind::kInt4, blocks = kind == roe::Kind::kMxFp4;
  const bool of_planes = kind == roe::Kind::kNested;
  const int64_t step = blocks || of_planes ? 32 : packed ? 8 : 4;
  const bool large = between(0, 9) == 0;  // more than a tile has, of tokens and columns
  const int64_t n = large ? between(40, 110) : between(1, 20);
  const int64_t count = between(1, 6), a = between(1, count);
  const int64_t d = large ? 64 * between(15, 35) : step * between(1, of_planes ? 6 : 24);
  const int64_t f = blocks ? 32 * between(1, 3) : between(1, 80);
  const int64_t most = kind == roe::Kind::kInt4 ? 64 : blocks ? 32 : 128;
  const bool scaled = kind >= roe::Kind::kInt8;
  const int64_t along = scaled ? std::gcd(most, d) : d, down = scaled ? std::gcd(most, f) : 1;
  const int64_t layer = between(0, 1), of_layer = layer * count;
  const int base = between(1, 3), planes = between(base, 5);
  const int64_t bits = of_planes ? between(base, std::min(planes, roe::kMostBits)) : 0;
  const auto make = [&](int64_t rows, int64_t by_column, int64_t by_row) {
    if (of_planes) return nested(rows, d, by_column, by_row, base, planes);
    return stored(kind, rows, d, by_column, by_row);
  };
  const Stored gate_up = make(2 * count * f * 2, along, 1);
  const Stored back = make(2 * count * f, scaled ? 1 : d, down);
  std::vector<int32_t> bits_of(of_planes && between(0, 1) ? count : 0);
  for (int32_t& own : bits_of) own = between(base, planes);
  const auto x = normals(n * d), gate_up_bias = normals(2 * count * f * 2);
  const auto down_bias = normals(2 * count * d);
  const bool biased = between(0, 1);
  std::vector<int32_t> indices(n * a);
  std::vector<float> gates = normals(n * a);
  for (int64_t t = 0; t < n; t++) {
    std::vector<int32_t> all(count);
    std::iota(all.begin(), all.end(), 0);
    std::shuffle(all.begin(), all.end(), generator);
    std::copy_n(all.begin(), a, indices.begin() + t * a);
  }
  if (between(0, 1)) gates[0] = 0, indices[0] = count;
  const roe::Activation activation{1.5f, 1.7f, between(0, 1) == 1, false};

  std::vector<double> right(n * d, 0.0);
  for (int64_t p = 0; p < n * a; p++) {
    if (gates[p] == 0) continue;
    const int64_t expert = of_layer + indices[p], t = p / a;
    const int64_t own = bits_of.empty() ? bits : std::min<int64_t>(bits, bits_of[indices[p]]);
    const auto& of_gate_up = gate_up.read(own);
    const auto& of_back = back.read(own);
    for (int64_t j = 0; j < f; j++) {
      double projected[2];
      for (int c = 0; c < 2; c++) {
        const int64_t row = (expert * f + j) * 2 + c;
        projected[c] = biased ? gate_up_bias[row] : 0;
        for (int64_t i = 0; i < d; i++) projected[c] += x[t * d + i] * of_gate_up[row * d + i];
      }
      double gate = projected[0], up = projected[1], hidden;
      if (activation.clamped) {
        gate = std::min(gate, 1.5);
        up = std::clamp(up, -1.5, 1.5);
        hidden = (up + 1) * gate / (1 + std::exp(-1.7f * gate));
      } else {
        hidden = gate / (1 + std::exp(-gate)) * up;
      }
      for (int64_t i = 0; i < d; i++) {
        right[t * d + i] += gates[p] * hidden * of_back[(expert * f + j) * d + i];
      }
    }
    for (int64_t i = 0; biased && i < d; i++) {
      right[t * d + i] += gates[p] * down_bias[expert * d + i];
    }
  }

  std::vector<float> first;
  for (const int64_t threads : {1, 2, 5}) {
    std::vector<float> y(n * d, NAN), hidden(n * a * f), reordered(n * (d + roe::kGap));
    roe::Experts e;
    e.num_tokens = n, e.num_choices = a, e.num_experts = count, e.d_model = d, e.d_expert = f;
    e.layer = layer;
    e.bits = bits, e.bits_of = bits_of.empty() ? nullptr : bits_of.data();
    e.gate_up = matrix(gate_up, 2 * count, 2 * f, d, d / along, d / along);
    e.down = matrix(back, 2 * count, f, d, down, d);
    e.gate_up_bias = biased ? gate_up_bias.data() : nullptr;
    e.down_bias = biased ? down_bias.data() : nullptr;
    e.bias_is_bfloat16 = false;
    e.x = x.data(), e.indices = indices.data(), e.gates = gates.data();
    e.activation = activation;
    e.y = y.data(), e.hidden = hidden.data(), e.reordered = reordered.data();
    {
      Pool pool{threads, {}, {}};
      roe::experts(pool, kind, e);
    }
    expect(y, right, "experts");
    if (first.empty()) first = y;
    if (first != y) std::printf("experts: %d threads differ\n", int(threads)), std::exit(1);
  }
}

void products(roe::Kind kind) {
  const bool large = between(0, 9) == 0;
  const bool packed = kind >= roe::Kind::kInt4, blocks = kind == roe::Kind::kMxFp4;
  const bool scaled = kind >= roe::Kind::kInt8;
  const int64_t n = large ? between(40, 110) : between(1, 20);
  const int64_t rows = blocks ? 32 * between(1, 6) : between(1, 200);
  const int64_t step = blocks ? 32 : packed ? 8 : 4;
  const int64_t d = large ? 32 * between(30, 70) : step * between(1, 400 / step);
  const int64_t most = kind == roe::Kind::kInt8 ? 128 : kind == roe::Kind::kInt4 ? 64 : 32;
  const int64_t along = scaled ? std::gcd(most, d) : d, down = scaled ? std::gcd(most, rows) : 1;
  const int64_t index = between(0, 1);
  // Groups along rows, and along columns.
  const Stored m = stored(kind, 2 * rows, d, along, 1);
  const Stored columns = stored(kind, 2 * rows, d, scaled ? 1 : d, down);
  const auto x = normals(n * d), h = normals(n * rows);
  std::vector<double> there(n * rows, 0.0), back(n * d, 0.0);
  for (int64_t t = 0; t < n; t++) {
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t i = 0; i < d; i++) {
        const int64_t at = (index * rows + r) * d + i;
        there[t * rows + r] += x[t * d + i] * m.values[at];
        back[t * d + i] += h[t * rows + r] * columns.values[at];
      }
    }
  }
  std::vector<float> one(n * rows, NAN), other(n * d, NAN), reordered(n * (d + roe::kGap));
  const roe::Matrix one_way = matrix(m, 2, rows, d, d / along, d / along);
  const roe::Matrix other_way = matrix(columns, 2, rows, d, down, d);
  Pool pool{between(1, 4), {}, {}};
  roe::project(pool, kind, one_way, index * rows, rows, n, x.data(), reordered.data(), one.data());
  roe::project_back(pool, kind, other_way, index * rows, rows, n, h.data(), other.data());
  expect(one, there, "project");
  expect(other, back, "project_back");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  for (int i = 0; i < rounds; i++) {
    for (int kind = 0; kind < 6; kind++) experts(static_cast<roe::Kind>(kind));
    for (int kind = 0; kind < 5; kind++) products(static_cast<roe::Kind>(kind));
  }
  std::printf("%d rounds of random shapes passed\n", rounds);
}
