// A pretended accelerator with two devices: its memory is the host's, its operators are the CPU's, each one counted.
// As torch has it by default, its tensors cannot take the place of the CPU's, so that `module.to` makes new parameters; FSDP2
// needs a device that allows it.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

using at::Tensor;
constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex NUM_DEVICES = 2;
thread_local c10::DeviceIndex current = 0;
bool like_ascend = false;

std::mutex mutex;
std::map<std::string, int64_t> counts;

void count(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex);
  ++counts[name];
}

c10::Dict<std::string, int64_t> operators() {
  std::lock_guard<std::mutex> lock(mutex);
  c10::Dict<std::string, int64_t> found;
  for (const auto& [name, times] : counts) {
    found.insert(name, times);
  }
  return found;
}

// ---- memory and devices

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    return {data, data, &c10::free_cpu, c10::Device(KIND, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &c10::free_cpu;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

Memory memory;
REGISTER_ALLOCATOR(KIND, &memory)

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return KIND;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return {KIND, current};
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < NUM_DEVICES, "there is no device ", device);
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) {
      current = device.index();
    }
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    count("a stream of its own");
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return NUM_DEVICES;
  }
  // every operator has ended when it returns
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return NUM_DEVICES;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current;
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    current = index;
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    count("pinned memory");
    return c10::GetCPUAllocator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto bytes = memory.allocate(size);
    if (auto kept = std::min(size, storage.nbytes())) {
      std::memcpy(bytes.get(), storage.data(), kept);
    }
    storage.set_data_ptr_noswap(std::move(bytes));
    storage.set_nbytes(size);
  }
};

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// ---- operators

// The same memory, as a tensor of the CPU.
Tensor host(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) {
    return tensor;
  }
  auto keep_alive = [tensor](void*) {};
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), keep_alive, options);
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  host(to).copy_(host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

Tensor as_strided(
    const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage(
    Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(
      self, std::move(source), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// Convolutions do not reach the fallback: torch asks each device for its own.
Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  count("aten::convolution_overrideable");
  auto hosted = bias ? std::optional<Tensor>(host(*bias)) : std::nullopt;
  return at::convolution_symint(
             host(input), host(weight), hosted, stride, padding, dilation, transposed, output_padding, groups)
      .to(input.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      host(gradient), host(input), host(weight), c10::SymIntArrayRef(gradient.sym_size(1)), stride, padding, dilation,
      transposed, output_padding, groups, wanted);
  auto there = [&](const Tensor& found) { return found.defined() ? found.to(input.device()) : found; };
  return {there(of_input), there(of_weight), there(of_bias)};
}

bool can_take_the_place(const Tensor& self, const Tensor& from) {
  return like_ascend || self.unsafeGetTensorImpl()->has_compatible_shallow_copy_type(from.key_set());
}

void on_copies_of_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  count(name);
  if (like_ascend && name == "aten::_fused_adamw_") {  // torch_npu's takes grad_scale and found_inf, and reads neither
    stack->end()[-1] = stack->end()[-2] = c10::IValue();
  }
  at::native::cpu_fallback(op, stack);
}

// ---- collectives

c10::IValue host(const c10::IValue& value) {
  if (value.isTensor()) {
    return host(value.toTensor());
  }
  if (value.isList()) {
    auto list = value.toList();
    c10::impl::GenericList hosted(list.elementType());
    for (const c10::IValue& item : list) {
      hosted.push_back(host(item));
    }
    return hosted;
  }
  return value;
}

bool is_float64(const c10::IValue& value) {
  if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    return !tensors.empty() && tensors[0].scalar_type() == at::kDouble;
  }
  return value.isTensor() && value.toTensor().defined() && value.toTensor().scalar_type() == at::kDouble;
}

void on_memory_of_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  count(schema.name());
  auto first = stack->end() - static_cast<int64_t>(schema.arguments().size());
  if (like_ascend && schema.name().find("reduce") != std::string::npos) {
    TORCH_CHECK(!is_float64(*first), schema.name(), ": this backend sums no float64");
  }
  for (auto argument = first; argument != stack->end(); ++argument) {
    *argument = host(*argument);
  }
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_copies_of_the_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", [](Tensor& self, c10::Storage source) -> Tensor& {
    return at::native::set_(self, std::move(source));
  });
  m.impl("_has_compatible_shallow_copy_type", can_take_the_place);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("set_.source_Tensor", [](Tensor& self, const Tensor& source) -> Tensor& {
    return at::native::set_tensor_(self, source);
  });
}

TORCH_LIBRARY_IMPL(c10d, PrivateUse1, m) {
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("c10d::", 0) == 0) {
      auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      m.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&on_memory_of_the_host>());
    }
  }
}

TORCH_LIBRARY(teapot, m) {
  m.def("operators", &operators);
  m.def("be_like_ascend() -> ()", [] { like_ascend = true; });
}

} // namespace
