// The Python module convmixer_fast._C: ops on addresses of float32 tensors.
//
// No tensor library is linked: one build works with every PyTorch version. The caller keeps
// the tensors alive, and packs weights and vectors as cpu/trunk.h says.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"
#include "cpu/trunk.h"

namespace py = pybind11;

namespace convmixer_fast {
namespace {

using Address = std::uintptr_t;

const float* input(Address address) { return reinterpret_cast<const float*>(address); }
float* output(Address address) { return reinterpret_cast<float*>(address); }

void check_at_least(const char* name, int64_t value, int64_t minimum) {
  if (value < minimum) {
    throw std::invalid_argument(std::string(name) + " must be at least " +
                                std::to_string(minimum) + ", got " + std::to_string(value));
  }
}

void check_address(const char* name, Address address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " has the address 0");
}

// Addresses of weight, bias, scale and shift, then the activation's number.
using Packed = std::tuple<Address, Address, Address, Address, int>;
// What a product computes with: how many numbers make a word; of 8 bits, which are 4, the address of
// the sums' scales, one over the input's scale, and its zero point.
using Numbers = std::tuple<int, Address, float, int>;

cpu::Epilogue to_epilogue(const Packed& packed) {
  const auto& [weight, bias, scale, shift, activation] = packed;
  check_address("weight", weight);
  check_address("bias", bias);
  check_address("scale", scale);
  check_address("shift", shift);
  if (activation < 0 || activation >= cpu::kActivationCount) {
    throw std::invalid_argument("activation must be from 0 to " +
                                std::to_string(cpu::kActivationCount - 1) + ", got " +
                                std::to_string(activation));
  }
  return {input(bias), input(scale), input(shift), static_cast<cpu::Activation>(activation)};
}

cpu::Numbers to_numbers(const Numbers& numbers) {
  const auto& [per_word, sum_scale, inverse_scale, zero] = numbers;
  const auto format = static_cast<cpu::Format>(per_word);
  if (format == cpu::Format::kInt8) {
    check_address("sum_scale", sum_scale);
    if (zero < 0 || zero > 255 || !(inverse_scale > 0)) {
      throw std::invalid_argument("zero must be from 0 to 255 and inverse_scale above 0, got " +
                                  std::to_string(zero) + " and " + std::to_string(inverse_scale));
    }
    return {format, inverse_scale, static_cast<float>(zero), input(sum_scale)};
  }
  if (format == cpu::Format::kBfloat16 && cpu::kernels().pointwise_bfloat16_tile == nullptr) {
    throw std::invalid_argument("this machine has no instructions for bfloat16");
  }
  if (format != cpu::Format::kFloat32 && format != cpu::Format::kBfloat16) {
    throw std::invalid_argument("1, 2 or 4 numbers make a word, got " + std::to_string(per_word));
  }
  return {format, 1, 0, nullptr};
}

cpu::ProductBlock to_product(const Packed& packed, int64_t channels_out,
                             const std::optional<Numbers>& numbers = {}) {
  check_at_least("channels_out", channels_out, 1);
  return {input(std::get<0>(packed)), to_epilogue(packed), channels_out,
          numbers ? to_numbers(*numbers) : cpu::Numbers{}};
}

cpu::DepthwiseBlock to_depthwise(const Packed& packed, int64_t channels, int64_t kernel_size,
                                 bool residual) {
  check_at_least("channels", channels, 1);
  check_at_least("kernel_size", kernel_size, 1);
  if (kernel_size % 2 == 0) {
    throw std::invalid_argument("kernel_size must be odd, got " + std::to_string(kernel_size));
  }
  const cpu::Epilogue epilogue = to_epilogue(packed);
  return {input(std::get<0>(packed)), epilogue, residual, channels, kernel_size};
}

cpu::Patches to_patches(int64_t channels, int64_t height, int64_t width, int64_t patch_h,
                        int64_t patch_w) {
  check_at_least("channels", channels, 1);
  check_at_least("patch_h", patch_h, 1);
  check_at_least("patch_w", patch_w, 1);
  check_at_least("height", height, patch_h);
  check_at_least("width", width, patch_w);
  return {channels, height, width, patch_h, patch_w};
}

void check_call(Address x, Address out, int64_t images, int threads) {
  check_address("x", x);
  check_address("out", out);
  check_at_least("images", images, 1);
  check_at_least("threads", threads, 1);
}

void pack(Address matrix, int64_t rows, int64_t depth, int64_t lanes, Address packed,
          int threads) {
  check_address("matrix", matrix);
  check_address("packed", packed);
  check_at_least("rows", rows, 1);
  check_at_least("depth", depth, 1);
  check_at_least("lanes", lanes, 1);
  check_at_least("threads", threads, 1);
  const py::gil_scoped_release release;
  cpu::pack(input(matrix), rows, depth, lanes, output(packed), threads);
}

void depthwise_block(const Packed& packed, int64_t channels, int64_t kernel_size, bool residual,
                     Address x, Address out, int64_t images, int64_t height, int64_t width,
                     int threads) {
  check_call(x, out, images, threads);
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  const cpu::DepthwiseBlock block = to_depthwise(packed, channels, kernel_size, residual);
  const py::gil_scoped_release release;
  cpu::run_depthwise(block, input(x), images, height, width, output(out), threads);
}

void product_block(const Packed& packed, int64_t channels_out, Address x, Address out,
                   int64_t images, int64_t channels, int64_t height, int64_t width,
                   int64_t patch_h, int64_t patch_w, int threads) {
  check_call(x, out, images, threads);
  const cpu::ProductBlock block = to_product(packed, channels_out);
  const cpu::Patches patches = to_patches(channels, height, width, patch_h, patch_w);
  const py::gil_scoped_release release;
  cpu::run_product(block, input(x), images, patches, output(out), threads);
}

std::map<std::string, double> rates(int threads) {
  check_at_least("threads", threads, 1);
  const py::gil_scoped_release release;
  const std::pair<const char*, cpu::Format> formats[] = {{"float32", cpu::Format::kFloat32},
                                                         {"bfloat16", cpu::Format::kBfloat16},
                                                         {"int8", cpu::Format::kInt8}};
  std::map<std::string, double> found;
  for (const auto& [name, format] : formats) {
    std::vector<double> of_thread(static_cast<size_t>(threads));
    cpu::parallel_for({threads}, threads, [&, format = format](int64_t, int64_t task, int) {
      of_thread[static_cast<size_t>(task)] = cpu::kernels().rate(format);
    });
    const double sum = std::accumulate(of_thread.begin(), of_thread.end(), 0.0);
    if (sum > 0) found[name] = sum;
  }
  return found;
}

// A trunk whose blocks are described once; the tensors behind the addresses are the caller's.
class Trunk {
 public:
  Trunk(const Packed& stem, int64_t channels, int64_t patch_h, int64_t patch_w,
        int64_t channels_out, const std::optional<Numbers>& numbers)
      : in_channels_(channels), patch_h_(patch_h), patch_w_(patch_w), channels_(channels_out) {
    to_patches(channels, patch_h, patch_w, patch_h, patch_w);
    trunk_.stem = to_product(stem, channels_out, numbers);
  }

  // numbers: of the pointwise product.
  void add_layer(const Packed& depthwise, int64_t kernel_size, const Packed& pointwise,
                 int64_t channels_out, const std::optional<Numbers>& numbers) {
    trunk_.layers.push_back({to_depthwise(depthwise, channels_, kernel_size, true),
                             to_product(pointwise, channels_out, numbers)});
    channels_ = channels_out;
  }

  void set_head(const Packed& head, int64_t channels_out) {
    trunk_.head = to_product(head, channels_out);
  }

  // result: 0 for the last layer's output, 1 for its mean, 2 for what the head makes of that.
  void run(Address x, Address out, int64_t images, int64_t height, int64_t width, int result,
           int threads) const {
    check_call(x, out, images, threads);
    if (result < 0 || result > (trunk_.head ? 2 : 1)) {
      throw std::invalid_argument("result must be 0, 1, or 2 if there is a head, got " +
                                  std::to_string(result));
    }
    const cpu::Patches patches = to_patches(in_channels_, height, width, patch_h_, patch_w_);
    const py::gil_scoped_release release;
    cpu::run_trunk(trunk_, input(x), images, patches, static_cast<cpu::Result>(result),
                   output(out), threads);
  }

  // outs: where the outputs of the stem and of the layers go, 0 for nowhere; the last one is not 0.
  void run_intermediates(Address x, const std::vector<Address>& outs, int64_t images,
                         int64_t height, int64_t width, int threads) const {
    if (outs.empty() || outs.size() > trunk_.layers.size() + 1) {
      throw std::invalid_argument("outs must be from 1 to " +
                                  std::to_string(trunk_.layers.size() + 1) + " addresses, got " +
                                  std::to_string(outs.size()));
    }
    check_call(x, outs.back(), images, threads);
    const cpu::Patches patches = to_patches(in_channels_, height, width, patch_h_, patch_w_);
    std::vector<float*> steps;
    for (const Address out : outs) steps.push_back(output(out));
    const py::gil_scoped_release release;
    cpu::run_intermediates(trunk_, input(x), images, patches, steps, threads);
  }

 private:
  cpu::Trunk trunk_;
  int64_t in_channels_;
  int64_t patch_h_;
  int64_t patch_w_;
  int64_t channels_;
};

// Small pieces of memory, of at most 8 bytes each, and what they held when this was made.
class Samples {
 public:
  Samples(const std::vector<Address>& addresses, const std::vector<int64_t>& sizes) {
    if (addresses.size() != sizes.size()) {
      throw std::invalid_argument("addresses and sizes must be as many, got " +
                                  std::to_string(addresses.size()) + " and " +
                                  std::to_string(sizes.size()));
    }
    for (size_t i = 0; i < addresses.size(); ++i) {
      check_address("a sample", addresses[i]);
      check_at_least("sizes", sizes[i], 1);
      if (sizes[i] > 8) {
        throw std::invalid_argument("sizes must be at most 8, got " + std::to_string(sizes[i]));
      }
      const void* at = reinterpret_cast<const void*>(addresses[i]);
      pieces_.push_back({at, static_cast<size_t>(sizes[i]),
                         read(at, static_cast<size_t>(sizes[i]))});
    }
  }

  bool unchanged() const {
    // All are read, whatever the first ones are: the reads wait for memory together.
    uint64_t differences = 0;
    for (const Piece& piece : pieces_) differences |= read(piece.at, piece.size) ^ piece.held;
    return differences == 0;
  }

 private:
  struct Piece {
    const void* at;
    size_t size;
    uint64_t held;
  };

  static uint64_t read(const void* at, size_t size) {
    uint64_t value = 0;
    if (size == 8) {
      std::memcpy(&value, at, 8);
    } else if (size == 4) {
      std::memcpy(&value, at, 4);
    } else {
      std::memcpy(&value, at, size);
    }
    return value;
  }

  std::vector<Piece> pieces_;
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  using py::arg;
  module.doc() = "Compiled CPU kernels of convmixer_fast, on addresses of float32 tensors.";
  module.attr("BLOCK") = static_cast<int>(cpu::kBlock);
  module.attr("PANEL") = static_cast<int>(cpu::kPanel);
  module.def(
      "isa", [] { return cpu::kernels().isa; },
      "The instruction set whose kernels run here: avx512_bf16, avx512_vnni, avx512, avx2_vnni, avx2 "
      "or baseline.");
  module.def("rates", &rates, arg("threads"),
             "Operations a second of so many threads at most, measured, by the name of what they "
             "compute with.");
  module.def("pack", &pack, arg("matrix"), arg("rows"), arg("depth"), arg("lanes"),
             arg("packed"), arg("threads"));
  module.def("depthwise_block", &depthwise_block, arg("packed"), arg("channels"),
             arg("kernel_size"), arg("residual"), arg("x"), arg("out"), arg("images"),
             arg("height"), arg("width"), arg("threads"));
  module.def("product_block", &product_block, arg("packed"), arg("channels_out"), arg("x"),
             arg("out"), arg("images"), arg("channels"), arg("height"), arg("width"),
             arg("patch_h"), arg("patch_w"), arg("threads"));
  py::class_<Trunk>(module, "Trunk")
      .def(py::init<const Packed&, int64_t, int64_t, int64_t, int64_t,
                    const std::optional<Numbers>&>(),
           arg("stem"), arg("channels"), arg("patch_h"), arg("patch_w"), arg("channels_out"),
           arg("numbers") = py::none())
      .def("add_layer", &Trunk::add_layer, arg("depthwise"), arg("kernel_size"),
           arg("pointwise"), arg("channels_out"), arg("numbers") = py::none())
      .def("set_head", &Trunk::set_head, arg("head"), arg("channels_out"))
      .def("run", &Trunk::run, arg("x"), arg("out"), arg("images"), arg("height"), arg("width"),
           arg("result"), arg("threads"))
      .def("run_intermediates", &Trunk::run_intermediates, arg("x"), arg("outs"), arg("images"),
           arg("height"), arg("width"), arg("threads"));
  py::class_<Samples>(module, "Samples")
      .def(py::init<const std::vector<Address>&, const std::vector<int64_t>&>(),
           arg("addresses"), arg("sizes"))
      .def("unchanged", &Samples::unchanged,
           "Whether the memory holds what it held when this was made.");
}

}  // namespace convmixer_fast
