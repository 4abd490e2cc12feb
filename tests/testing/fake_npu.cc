#include "tests/testing/fake_npu.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>

#include <atomic>
#include <fstream>
#include <map>
#include <mutex>

namespace pyramid::testing {
namespace {

using torch::Tensor;
using torch::jit::Stack;

constexpr c10::DeviceType kNpu = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kNpuKeys(c10::DispatchKey::PrivateUse1);

thread_local c10::DeviceIndex current_device = 0;
std::atomic<int64_t> cpu_fallbacks = 0;

// ---- Memory: closed but for those who hold a HostView ----

class Memory {
 public:
  void* Allocate(size_t bytes) {
    void* block = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(block != MAP_FAILED, "The fake NPU is out of memory.");
    const std::lock_guard lock(mutex_);
    blocks_[block] = {.bytes = bytes};
    return block;
  }

  void Free(void* block) {
    const std::lock_guard lock(mutex_);
    munmap(block, blocks_.at(block).bytes);
    blocks_.erase(block);
  }

  void Open(void* block) {
    const std::lock_guard lock(mutex_);
    Block& of = blocks_.at(block);
    if (of.views++ == 0) mprotect(block, of.bytes, PROT_READ | PROT_WRITE);
  }

  void Close(void* block) {
    const std::lock_guard lock(mutex_);
    Block& of = blocks_.at(block);
    if (--of.views == 0) mprotect(block, of.bytes, PROT_NONE);
  }

 private:
  struct Block {
    size_t bytes = 0;
    int views = 0;
  };
  std::mutex mutex_;
  std::map<void*, Block> blocks_;
};

Memory& TheMemory() {
  static auto* memory = new Memory;
  return *memory;
}

class NpuAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes == 0 ? nullptr : TheMemory().Allocate(bytes);
    return {block, block, &Free, c10::Device(kNpu, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &Free; }
  void copy_data(void* /*to*/, const void* /*from*/, size_t /*bytes*/) const override {
    TORCH_CHECK(false, "The fake NPU's memory is copied by copy_.");
  }

 private:
  static void Free(void* block) {
    if (block != nullptr) TheMemory().Free(block);
  }
};

// A tensor of either device as one of the CPU, the memory open as long as this lives.
class HostView {
 public:
  explicit HostView(const Tensor& tensor) : tensor_(tensor) {
    if (tensor.is_cpu()) return;
    block_ = tensor.storage().mutable_data();
    if (block_ != nullptr) TheMemory().Open(block_);
    tensor_ = at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(),
                            at::TensorOptions(tensor.scalar_type()));
  }
  ~HostView() {
    if (block_ != nullptr) TheMemory().Close(block_);
  }
  HostView(const HostView&) = delete;
  HostView& operator=(const HostView&) = delete;

  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
  void* block_ = nullptr;
};

// ---- Device ----

struct NpuGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kNpu, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < kFakeNpus, "There is no ", device, ".");
    current_device = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kFakeNpus; }
};

struct NpuHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex /*index*/) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kFakeNpus; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_device = index; }
};

// ---- Kernels that every backend has to bring ----

c10::Device DeviceOf(std::optional<c10::Device> device) {
  return {kNpu, device.has_value() && device->has_index() ? device->index() : current_device};
}

Tensor Empty(at::IntArrayRef size, std::optional<at::ScalarType> type,
             std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
             std::optional<bool> /*pin_memory*/, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(DeviceOf(device));
  return at::detail::empty_generic(size, c10::GetAllocator(kNpu), kNpuKeys,
                                   c10::dtype_or_default(type), format);
}

Tensor EmptyStrided(at::IntArrayRef size, at::IntArrayRef stride,
                    std::optional<at::ScalarType> type, std::optional<at::Layout> /*layout*/,
                    std::optional<at::Device> device, std::optional<bool> /*pin_memory*/) {
  const c10::DeviceGuard guard(DeviceOf(device));
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(kNpu), kNpuKeys,
                                           c10::dtype_or_default(type));
}

Tensor CopyFrom(const Tensor& self, const Tensor& to, bool /*non_blocking*/) {
  const HostView from(self), into(to);
  into.tensor().copy_(from.tensor());
  return to;
}

Tensor CopyFromAndResize(const Tensor& self, const Tensor& to) {
  TORCH_CHECK(self.sizes() == to.sizes(), "The fake NPU doesn't resize ", to.sizes(), " to ",
              self.sizes(), ".");
  return CopyFrom(self, to, false);
}

// torch_npu says so as well: a module's parameters may move there and back.
bool HasCompatibleShallowCopyType(const Tensor& /*self*/, const Tensor& /*from*/) { return true; }

at::Scalar LocalScalarDense(const Tensor& self) { return HostView(self).tensor().item(); }

Tensor Convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                   bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  const bool has_bias = bias.has_value() && bias->defined();
  return at::convolution(input.cpu(), weight.cpu(),
                         has_bias ? std::optional(bias->cpu()) : std::nullopt, stride, padding,
                         dilation, transposed, output_padding, groups)
      .to(input.device());
}

std::tuple<Tensor, Tensor, Tensor> ConvolutionBackward(const Tensor& d_out, const Tensor& input,
                                                       const Tensor& weight, at::IntArrayRef stride,
                                                       at::IntArrayRef padding,
                                                       at::IntArrayRef dilation, bool transposed,
                                                       at::IntArrayRef output_padding,
                                                       int64_t groups, std::array<bool, 3> wanted) {
  const std::vector<int64_t> bias_sizes = {d_out.size(1)};
  const auto [d_input, d_weight, d_bias] =
      at::convolution_backward(d_out.cpu(), input.cpu(), weight.cpu(), bias_sizes, stride, padding,
                               dilation, transposed, output_padding, groups, wanted);
  const auto back = [&](const Tensor& t) { return t.defined() ? t.to(input.device()) : t; };
  return {back(d_input), back(d_weight), back(d_bias)};
}

void LeaveToTheCpu(const c10::OperatorHandle& op, Stack* stack) {
  ++cpu_fallbacks;
  at::native::cpu_fallback(op, stack);
}

std::vector<torch::Library> RegisterKernels() {
  std::vector<torch::Library> libraries;
  libraries.push_back(MAKE_TORCH_LIBRARY_IMPL(_, PrivateUse1));
  libraries.back().fallback(torch::CppFunction::makeFromBoxedFunction<&LeaveToTheCpu>());

  libraries.push_back(MAKE_TORCH_LIBRARY_IMPL(aten, PrivateUse1));
  torch::Library& aten = libraries.back();
  aten.impl("empty.memory_format", TORCH_FN(Empty));
  aten.impl("empty_strided", TORCH_FN(EmptyStrided));
  aten.impl("_copy_from", TORCH_FN(CopyFrom));
  aten.impl("_copy_from_and_resize", TORCH_FN(CopyFromAndResize));
  aten.impl("_has_compatible_shallow_copy_type", TORCH_FN(HasCompatibleShallowCopyType));
  aten.impl("_local_scalar_dense", TORCH_FN(LocalScalarDense));
  aten.impl("view", TORCH_FN(at::native::view));
  aten.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  aten.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  aten.impl("convolution_overrideable", TORCH_FN(Convolution));
  aten.impl("convolution_backward_overrideable", TORCH_FN(ConvolutionBackward));

  // What PvtV2 calls of the operations that autocast rounds, on the CPU and in torch_npu alike.
  libraries.push_back(MAKE_TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1));
  libraries.back().fallback(torch::CppFunction::makeFallthrough());
  libraries.push_back(MAKE_TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1));
  torch::Library& m = libraries.back();
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  return libraries;
}

// ---- The fused attention ----

FakeFusionAttention::Calls calls_so_far;

// A call's arguments by name.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, const Stack& stack)
      : schema_(op.schema()),
        values_(stack.end() - static_cast<std::ptrdiff_t>(schema_.arguments().size()),
                stack.end()) {}

  const c10::IValue& operator[](const char* name) const {
    const std::optional<int> index = schema_.argumentIndexWithName(name);
    TORCH_CHECK(index.has_value(), schema_.name(), " has no argument ", name, ".");
    return values_[static_cast<size_t>(*index)];
  }

  void ExpectDefaultsExceptOf(const std::vector<std::string>& names) const {
    for (size_t i = 0; i < values_.size(); ++i) {
      const c10::Argument& argument = schema_.arguments()[i];
      if (std::find(names.begin(), names.end(), argument.name()) != names.end()) continue;
      TORCH_CHECK(argument.default_value().has_value() && values_[i] == *argument.default_value(),
                  schema_.name(), ": ", argument.name(), " is ", values_[i], ".");
    }
  }

 private:
  const c10::FunctionSchema& schema_;
  std::vector<c10::IValue> values_;
};

// [B, S, h·D] of any type on the device → [B, h, S, D] f32 on the CPU.
Tensor Heads(const Tensor& x, int64_t heads) {
  return x.cpu().to(torch::kFloat32).unflatten(2, {heads, -1}).transpose(1, 2);
}

// Back.
Tensor Joined(const Tensor& x, const Tensor& like) {
  return x.transpose(1, 2).flatten(2).to(like.scalar_type()).to(like.device());
}

void CheckInputs(const Arguments& arguments) {
  const Tensor q = arguments["query"].toTensor(), k = arguments["key"].toTensor(),
               v = arguments["value"].toTensor();
  TORCH_CHECK(arguments["input_layout"].toStringRef() == "BSH", "Layout ",
              arguments["input_layout"], ".");
  const torch::ScalarType type = q.scalar_type();
  TORCH_CHECK(type == torch::kFloat32 || type == torch::kHalf || type == torch::kBFloat16, "Type ",
              type, ".");
  const int64_t heads = arguments["head_num"].toInt();
  TORCH_CHECK(heads >= 1 && heads <= 256 && q.dim() == 3 && q.size(2) % heads == 0 &&
                  q.size(2) / heads <= 768 && q.numel() > 0 && k.numel() > 0,
              q.sizes(), " for ", heads, " heads.");
  TORCH_CHECK(
      k.sizes() == v.sizes() && k.dim() == 3 && k.size(0) == q.size(0) && k.size(2) == q.size(2),
      "Query ", q.sizes(), ", key ", k.sizes(), ", value ", v.sizes(), ".");
  for (const Tensor& tensor : {q, k, v}) {
    TORCH_CHECK(tensor.scalar_type() == type && tensor.device() == q.device() &&
                    tensor.device().type() == kNpu && tensor.is_contiguous(),
                "Types, devices or strides differ.");
  }
}

// Softmax's maximum and sum come eight times over, as on the real device.
constexpr int64_t kCopies = 8;

void Attend(const c10::OperatorHandle& op, Stack* stack) {
  const Arguments arguments(op, *stack);
  CheckInputs(arguments);
  arguments.ExpectDefaultsExceptOf(
      {"query", "key", "value", "head_num", "input_layout", "scale", "keep_prob"});
  TORCH_CHECK(arguments["keep_prob"].toDouble() == 1, "Dropout in PVT v2?");
  const Tensor query = arguments["query"].toTensor();
  const int64_t heads = arguments["head_num"].toInt();
  const double scale = arguments["scale"].toDouble();
  ++calls_so_far.forward;
  calls_so_far.heads = heads;
  calls_so_far.scale = scale;
  calls_so_far.keep_prob = arguments["keep_prob"].toDouble();
  calls_so_far.type = query.scalar_type();

  const Tensor q = Heads(query, heads), k = Heads(arguments["key"].toTensor(), heads),
               v = Heads(arguments["value"].toTensor(), heads);
  const Tensor scores = torch::matmul(q, k.transpose(2, 3)) * scale;  // [B, h, N, M]
  const Tensor most = scores.amax(-1, true);                          // [B, h, N, 1]
  const Tensor powers = torch::exp(scores - most), sum = powers.sum(-1, true);
  const Tensor out = Joined(torch::matmul(powers / sum, v), query);  // [B, N, C]
  const auto copies = [&](const Tensor& x) {
    return x.expand({-1, -1, -1, kCopies}).contiguous().to(query.device());
  };
  torch::jit::drop(*stack, op.schema().arguments().size());
  torch::jit::push(*stack, out, copies(most), copies(sum), torch::empty({0}, query.options()),
                   int64_t{0}, int64_t{0}, int64_t{0});
}

void AttendBackward(const c10::OperatorHandle& op, Stack* stack) {
  const Arguments arguments(op, *stack);
  CheckInputs(arguments);
  arguments.ExpectDefaultsExceptOf({"query", "key", "value", "dy", "head_num", "input_layout",
                                    "softmax_max", "softmax_sum", "softmax_in", "attention_in",
                                    "scale_value"});
  ++calls_so_far.backward;
  const Tensor query = arguments["query"].toTensor(), key = arguments["key"].toTensor();
  const int64_t heads = arguments["head_num"].toInt();
  const double scale = arguments["scale_value"].toDouble();
  const Tensor q = Heads(query, heads), k = Heads(key, heads),
               v = Heads(arguments["value"].toTensor(), heads),
               d_out = Heads(arguments["dy"].toTensor(), heads),
               out = Heads(arguments["attention_in"].toTensor(), heads);
  const auto one = [&](const char* name) {
    return arguments[name].toTensor().cpu().narrow(-1, 0, 1);
  };
  const Tensor p = torch::exp(torch::matmul(q, k.transpose(2, 3)) * scale - one("softmax_max")) /
                   one("softmax_sum");  // [B, h, N, M]
  const Tensor dp = torch::matmul(d_out, v.transpose(2, 3));
  const Tensor ds = p * (dp - (d_out * out).sum(-1, true)) * scale;
  const Tensor dq = Joined(torch::matmul(ds, k), query);
  const Tensor dk = Joined(torch::matmul(ds.transpose(2, 3), q), key);
  const Tensor dv = Joined(torch::matmul(p.transpose(2, 3), d_out), key);
  torch::jit::drop(*stack, op.schema().arguments().size());
  torch::jit::push(*stack, dq, dk, dv, Tensor(), Tensor());
}

struct AttentionGradient : torch::autograd::Function<AttentionGradient> {
  // `stack`: the operator's arguments, then its results.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& query,
                        const Tensor& key, const Tensor& value, const c10::OperatorHandle* op,
                        Stack* stack) {
    const Arguments arguments(*op, *stack);
    context->saved_data["heads"] = arguments["head_num"];
    context->saved_data["layout"] = arguments["input_layout"];
    context->saved_data["scale"] = arguments["scale"];
    const at::AutoDispatchBelowADInplaceOrView below;
    op->callBoxed(stack);
    const size_t first = stack->size() - op->schema().returns().size();
    const auto result = [&](size_t i) { return (*stack)[first + i].toTensor(); };
    context->save_for_backward({query, key, value, result(0), result(1), result(2)});
    return result(0);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const std::map<std::string, c10::IValue> given = {
        {"query", saved[0]},
        {"key", saved[1]},
        {"value", saved[2]},
        {"dy", gradients[0].contiguous()},
        {"attention_in", saved[3]},
        {"softmax_max", saved[4]},
        {"softmax_sum", saved[5]},
        {"head_num", context->saved_data["heads"]},
        {"input_layout", context->saved_data["layout"]},
        {"scale_value", context->saved_data["scale"]}};
    const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("npu::npu_fusion_attention_grad", "");
    Stack stack;
    for (const c10::Argument& argument : op.schema().arguments()) {
      const auto found = given.find(argument.name());
      stack.push_back(found == given.end() ? argument.default_value().value() : found->second);
    }
    op.callBoxed(&stack);
    return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), Tensor(), Tensor()};
  }
};

void AttendDifferentiably(const c10::OperatorHandle& op, Stack* stack) {
  const Arguments arguments(op, *stack);
  const Tensor out =
      AttentionGradient::apply(arguments["query"].toTensor(), arguments["key"].toTensor(),
                               arguments["value"].toTensor(), &op, stack);
  (*stack)[stack->size() - op.schema().returns().size()] = out;
}

}  // namespace

void RegisterFakeNpu() {
  static const bool once = [] {
    c10::register_privateuse1_backend("npu");
    c10::SetAllocator(kNpu, new NpuAllocator);
    const c10::impl::DeviceGuardImplRegistrar guard(kNpu, new NpuGuard);
    at::RegisterPrivateUse1HooksInterface(new NpuHooks);
    new std::vector<torch::Library>(RegisterKernels());
    return true;
  }();
  (void)once;
}

void SetCurrentFakeNpu(int index) { current_device = static_cast<c10::DeviceIndex>(index); }

int64_t CpuFallbacks() { return cpu_fallbacks; }

std::vector<std::string> NpuSchemas() {
  std::ifstream file(PYRAMID_SOURCE_DIR "/tests/golden/npu_schemas.txt");
  std::vector<std::string> schemas;
  for (std::string line; std::getline(file, line);) schemas.push_back(line);
  TORCH_CHECK(schemas.size() == 2, "tests/golden/npu_schemas.txt has ", schemas.size(), " lines.");
  return schemas;
}

FakeFusionAttention::FakeFusionAttention(const std::vector<std::string>& schemas) {
  calls_so_far = {};
  libraries_.emplace_back(torch::Library::DEF, "npu", std::nullopt, __FILE__, __LINE__);
  for (const std::string& schema : schemas) libraries_.back().def(schema.c_str());
  libraries_.push_back(MAKE_TORCH_LIBRARY_IMPL(npu, PrivateUse1));
  libraries_.back().impl("npu_fusion_attention",
                         torch::CppFunction::makeFromBoxedFunction<&Attend>());
  libraries_.back().impl("npu_fusion_attention_grad",
                         torch::CppFunction::makeFromBoxedFunction<&AttendBackward>());
  libraries_.push_back(MAKE_TORCH_LIBRARY_IMPL(npu, AutogradPrivateUse1));
  libraries_.back().impl("npu_fusion_attention",
                         torch::CppFunction::makeFromBoxedFunction<&AttendDifferentiably>());
}

FakeFusionAttention::~FakeFusionAttention() {
  // Kernels before what they belong to.
  while (!libraries_.empty()) libraries_.pop_back();
}

FakeFusionAttention::Calls FakeFusionAttention::calls() const { return calls_so_far; }

}  // namespace pyramid::testing
