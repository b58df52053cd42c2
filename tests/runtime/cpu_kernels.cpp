// The CPU kernels without Python: for processors of other kinds, under an emulator, and for a look at
// what threads do to each other.
//
// Compares each op, and a trunk, with sums in double; prints the worst error of each and fails above
// a limit. The argument is the number of threads that do all this at once, and want two each.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/trunk.h"

using namespace convmixer_fast::cpu;
using Floats = std::vector<float>;

namespace {

thread_local std::mt19937 engine(0);
thread_local double worst = 0;
thread_local bool printing = true;

Floats random(int64_t size, double scale = 1) {
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  Floats values(size);
  for (float& value : values) value = normal(engine);
  return values;
}

int64_t to_panels(int64_t channels) { return divide_up(channels, kPanel) * kPanel; }

// Vectors are padded to whole panels with zeros.
struct Vectors {
  Floats bias, scale, shift;

  explicit Vectors(int64_t channels)
      : bias(random(channels)), scale(random(channels)), shift(random(channels)) {
    for (Floats* vector : {&bias, &scale, &shift}) vector->resize(to_panels(channels));
  }
  Epilogue epilogue(Activation activation) const {
    return {bias.data(), scale.data(), shift.data(), activation};
  }
  double apply(double sum, int64_t c, Activation activation) const {
    const double v = sum + bias[c];
    double a = v;
    if (activation == Activation::kGelu) a = 0.5 * v * std::erfc(-v / std::sqrt(2.0));
    if (activation == Activation::kGeluTanh) {
      a = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    }
    if (activation == Activation::kRelu) a = v > 0 ? v : 0;
    return a * scale[c] + shift[c];
  }
};

Floats packed(const Floats& matrix, int64_t rows, int64_t lanes) {
  const int64_t depth = static_cast<int64_t>(matrix.size()) / rows;
  Floats out(divide_up(rows, lanes) * depth * lanes);
  pack(matrix.data(), rows, depth, lanes, out.data(), 1);
  return out;
}

void compare(const char* what, const Floats& found, const std::vector<double>& expected) {
  double error = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double difference = std::abs(found[i] - expected[i]) / (1 + std::abs(expected[i]));
    if (!(difference <= error)) error = difference;  // NaN too
  }
  if (printing) std::printf("%s: %.1e\n", what, error);
  if (!(error <= worst)) worst = error;
}

std::vector<double> depthwise_reference(const Floats& x, const Floats& weight, const Vectors& v,
                                        Activation activation, int64_t images, int64_t channels,
                                        int64_t height, int64_t width, int64_t k) {
  std::vector<double> out;
  for (int64_t plane = 0; plane < images * channels; ++plane) {
    const int64_t c = plane % channels;
    const float* source = x.data() + plane * height * width;
    for (int64_t row = 0; row < height; ++row) {
      for (int64_t column = 0; column < width; ++column) {
        double sum = 0;
        for (int64_t tap = 0; tap < k * k; ++tap) {
          const int64_t r = row + tap / k - k / 2, q = column + tap % k - k / 2;
          if (r < 0 || r >= height || q < 0 || q >= width) continue;
          sum += static_cast<double>(weight[c * k * k + tap]) * source[r * width + q];
        }
        out.push_back(v.apply(sum, c, activation) + source[row * width + column]);
      }
    }
  }
  return out;
}

template <typename Number>
std::vector<double> product_reference(const std::vector<Number>& x, const Floats& weight,
                                      const Vectors& v, Activation activation, int64_t images,
                                      const Patches& p, int64_t channels_out) {
  std::vector<double> out;
  for (int64_t image = 0; image < images; ++image) {
    for (int64_t o = 0; o < channels_out; ++o) {
      for (int64_t patch = 0; patch < p.rows() * p.columns(); ++patch) {
        double sum = 0;
        for (int64_t i = 0; i < p.depth(); ++i) {
          const int64_t c = i / (p.patch_h * p.patch_w), at = i % (p.patch_h * p.patch_w);
          const int64_t row = patch / p.columns() * p.patch_h + at / p.patch_w;
          const int64_t column = patch % p.columns() * p.patch_w + at % p.patch_w;
          const int64_t pixel = ((image * p.channels + c) * p.height + row) * p.width + column;
          sum += static_cast<double>(weight[o * p.depth() + i]) * static_cast<double>(x[pixel]);
        }
        out.push_back(v.apply(sum, o, activation));
      }
    }
  }
  return out;
}

void check_depthwise(int64_t channels, int64_t height, int64_t width, int64_t k, Activation a) {
  const Floats x = random(2 * channels * height * width), weight = random(channels * k * k, 1.0 / k);
  const Vectors v(channels);
  const Floats ready = packed(weight, channels, kBlock);
  Floats out(x.size(), NAN);
  run_depthwise({ready.data(), v.epilogue(a), true, channels, k}, x.data(), 2, height, width,
                out.data(), 2);
  compare("depthwise", out, depthwise_reference(x, weight, v, a, 2, channels, height, width, k));
}

void check_product(const Patches& p, int64_t channels_out, Activation a) {
  const Floats x = random(2 * p.channels * p.height * p.width);
  const Floats weight = random(channels_out * p.depth(), 1 / std::sqrt(p.depth()));
  const Vectors v(channels_out);
  const Floats ready = packed(weight, channels_out, kPanel);
  Floats out(2 * channels_out * p.rows() * p.columns(), NAN);
  run_product({ready.data(), v.epilogue(a), channels_out}, x.data(), 2, p, out.data(), 2);
  compare("product", out, product_reference(x, weight, v, a, 2, p, channels_out));
}

void check_trunk(int64_t channels, int64_t side) {
  const Activation a = Activation::kGelu;
  const Patches patches{3, 2 * side, 2 * side, 2, 2}, pixels{channels, side, side, 1, 1};
  const Floats image = random(3 * 4 * side * side), stem = random(channels * 12, 0.3);
  const Floats taps = random(channels * 25, 0.2);
  const Floats weight = random(channels * channels, 1 / std::sqrt(channels));
  const Vectors v0(channels), v1(channels), v2(channels);
  const Floats stem_ready = packed(stem, channels, kPanel), taps_ready = packed(taps, channels, kBlock);
  const Floats ready = packed(weight, channels, kPanel);
  Trunk trunk;
  trunk.stem = {stem_ready.data(), v0.epilogue(a), channels};
  trunk.layers.push_back({{taps_ready.data(), v1.epilogue(a), true, channels, 5},
                          {ready.data(), v2.epilogue(a), channels}});
  Floats out(channels * side * side, NAN);
  run_trunk(trunk, image.data(), 1, patches, Result::kFeatures, out.data(), 2);
  const std::vector<double> first = product_reference(image, stem, v0, a, 1, patches, channels);
  const Floats rounded(first.begin(), first.end());
  const std::vector<double> second =
      depthwise_reference(rounded, taps, v1, a, 1, channels, side, side, 5);
  compare("trunk", out,
          product_reference(second, weight, v2, a, 1, pixels, channels));
}

// A product of 8-bit numbers whose inputs are whole steps of their scale: nothing is rounded.
void check_int8(int64_t depth, int64_t channels_out, int64_t pixels) {
  constexpr int64_t kGroup = 4 * kBlock;
  constexpr float kStep = 0.03125F;
  constexpr int kZero = 97;
  std::uniform_int_distribution<int> numbers(0, 255), weights(-64, 64);
  const int64_t groups = divide_up(depth, kGroup), panels = divide_up(channels_out, kPanel);
  std::vector<int8_t> ready(panels * groups * kGroup * kPanel);
  Floats weight(channels_out * depth), x(depth * pixels), sum_scale(to_panels(channels_out));
  const Vectors v(channels_out);
  Floats bias = v.bias;
  for (float& value : x) value = static_cast<float>(numbers(engine) - kZero) * kStep;
  for (int64_t o = 0; o < channels_out; ++o) {
    sum_scale[o] = kStep / static_cast<float>(100 + o);
    int total = 0;
    for (int64_t i = 0; i < depth; ++i) {
      const int q = weights(engine);
      const int64_t word = (o / kPanel * groups + i / kGroup) * kBlock + i % kBlock;
      ready[(word * kPanel + o % kPanel) * 4 + i % kGroup / kBlock] = static_cast<int8_t>(q);
      weight[o * depth + i] = static_cast<float>(q) / static_cast<float>(100 + o);
      total += q;
    }
    bias[o] -= sum_scale[o] * static_cast<float>(kZero * total);
  }
  const Patches patches{depth, 1, pixels, 1, 1};
  Trunk trunk;
  trunk.stem = {ready.data(),
                {bias.data(), v.scale.data(), v.shift.data(), Activation::kRelu},
                channels_out,
                {Format::kInt8, 1 / kStep, static_cast<float>(kZero), sum_scale.data()}};
  Floats out(channels_out * pixels, NAN);
  run_trunk(trunk, x.data(), 1, patches, Result::kFeatures, out.data(), 2);
  compare("8 bits", out,
          product_reference(x, weight, v, Activation::kRelu, 1, patches, channels_out));
}

double check_all() {
  for (const Activation a : {Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
    for (const int64_t k : {1, 3, 5, 7, 9, 11}) check_depthwise(37, 11, 13, k, a);
    check_depthwise(5, 1, 17, 7, a);
    check_depthwise(16, 8, 3, 9, a);
    check_product({40, 7, 9, 1, 1}, 35, a);
    check_product({3, 29, 22, 7, 7}, 50, a);
    check_product({131, 1, 1, 1, 1}, 7, a);
  }
  check_trunk(40, 9);
  check_trunk(256, 9);
  check_int8(1, 1, 1);
  check_int8(70, 41, 13);
  check_int8(256, 64, 50);
  return worst;
}

}  // namespace

int main(int count, char** arguments) {
  std::printf("kernels: %s\n", kernels().isa);
  std::vector<double> found(count > 1 ? std::atoi(arguments[1]) : 1);
  std::vector<std::thread> others;
  for (size_t i = 1; i < found.size(); ++i) {
    others.emplace_back([&found, i] {
      printing = false;
      found[i] = check_all();
    });
  }
  found[0] = check_all();
  for (std::thread& other : others) other.join();
  const double largest = *std::max_element(found.begin(), found.end());
  // A float has 24 bits; sums are of up to 256 products, and two layers add up.
  std::printf("worst: %.1e\n", largest);
  return largest < 5e-6 ? 0 : 1;
}
