// The Python module convmixer_fast._C: ops on addresses of float32 tensors, contiguous NCHW.
//
// No tensor library is linked: one build works with every PyTorch version. The caller keeps
// the tensors alive. An optional vector is passed as address 0.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/blocks.h"
#include "cpu/dispatch.h"

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

void check_address(const char* name, Address address, bool empty = false) {
  if (address == 0 && !empty) throw std::invalid_argument(std::string(name) + " has the address 0");
}

cpu::Activation to_activation(int activation) {
  if (activation < 0 || activation >= cpu::kActivationCount) {
    throw std::invalid_argument("activation must be 0 (gelu), 1 (gelu_tanh) or 2 (relu), got " +
                                std::to_string(activation));
  }
  return static_cast<cpu::Activation>(activation);
}

cpu::ImageShape to_shape(int64_t images, int64_t channels, int64_t height, int64_t width) {
  check_at_least("images", images, 1);
  check_at_least("channels", channels, 0);
  check_at_least("height", height, 1);
  check_at_least("width", width, 1);
  return {images, channels, height, width};
}

void depthwise_block(Address x, Address weight, Address bias, Address scale, Address shift,
                     Address out, int64_t images, int64_t channels, int64_t height,
                     int64_t width, int64_t kernel_size, int activation, bool residual,
                     int threads) {
  check_address("x", x);
  check_address("weight", weight);
  check_address("out", out);
  check_at_least("channels", channels, 1);
  check_at_least("threads", threads, 1);
  check_at_least("kernel_size", kernel_size, 1);
  if (kernel_size % 2 == 0) {
    throw std::invalid_argument("kernel_size must be odd, got " + std::to_string(kernel_size));
  }
  const cpu::ImageShape shape = to_shape(images, channels, height, width);
  const cpu::Activation act = to_activation(activation);
  const py::gil_scoped_release release;
  cpu::depthwise_block(input(x), input(weight), output(out), shape, kernel_size,
                       {input(bias), input(scale), input(shift)}, act, residual, threads);
}

void pointwise_block(Address x, Address weight, Address bias, Address scale, Address shift,
                     Address out, int64_t images, int64_t channels, int64_t height,
                     int64_t width, int64_t channels_out, int activation, int threads) {
  check_address("x", x, channels == 0);
  check_address("weight", weight, channels == 0);
  check_address("out", out);
  check_at_least("threads", threads, 1);
  check_at_least("channels_out", channels_out, 1);
  const cpu::ImageShape shape = to_shape(images, channels, height, width);
  const cpu::Activation act = to_activation(activation);
  const py::gil_scoped_release release;
  cpu::pointwise_block(input(x), input(weight), output(out), shape, channels_out,
                       {input(bias), input(scale), input(shift)}, act, threads);
}

void patch_embed(Address x, Address weight, Address bias, Address scale, Address shift,
                 Address out, int64_t images, int64_t channels, int64_t height, int64_t width,
                 int64_t channels_out, int64_t patch_h, int64_t patch_w, int activation,
                 int threads) {
  check_address("x", x, channels == 0);
  check_address("weight", weight, channels == 0);
  check_address("out", out);
  check_at_least("threads", threads, 1);
  check_at_least("channels_out", channels_out, 1);
  check_at_least("patch_h", patch_h, 1);
  check_at_least("patch_w", patch_w, 1);
  const cpu::ImageShape shape = to_shape(images, channels, height, width);
  check_at_least("height", height, patch_h);
  check_at_least("width", width, patch_w);
  const cpu::Activation act = to_activation(activation);
  const py::gil_scoped_release release;
  cpu::patch_embed(input(x), input(weight), output(out), shape, channels_out, patch_h, patch_w,
                   {input(bias), input(scale), input(shift)}, act, threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using py::arg;
  module.doc() = "Compiled CPU kernels of convmixer_fast, on addresses of float32 tensors.";
  module.def(
      "isa", [] { return cpu::kernels().isa; },
      "The instruction set whose kernels run here: avx512, avx2 or baseline.");
  module.def("depthwise_block", &depthwise_block, arg("x"), arg("weight"), arg("bias"),
             arg("scale"), arg("shift"), arg("out"), arg("images"), arg("channels"),
             arg("height"), arg("width"), arg("kernel_size"), arg("activation"),
             arg("residual"), arg("threads"));
  module.def("pointwise_block", &pointwise_block, arg("x"), arg("weight"), arg("bias"),
             arg("scale"), arg("shift"), arg("out"), arg("images"), arg("channels"),
             arg("height"), arg("width"), arg("channels_out"), arg("activation"),
             arg("threads"));
  module.def("patch_embed", &patch_embed, arg("x"), arg("weight"), arg("bias"), arg("scale"),
             arg("shift"), arg("out"), arg("images"), arg("channels"), arg("height"),
             arg("width"), arg("channels_out"), arg("patch_h"), arg("patch_w"),
             arg("activation"), arg("threads"));
}

}  // namespace convmixer_fast
