"""A second device where there is none: the device `sim` of torch, in the host's own memory, that refuses what a GPU refuses.

    PYTHONPATH=tests CXR_TEST_DEVICE=sim pytest -p simulated_device tests/test_gpu.py -k same

Every operation runs as torch's own on the CPU (`at::native::cpu_fallback`), after a look at where its tensors lie: another device than `sim` is an error, but for CPU tensors
without dimensions that are only read and for CPU indices, as with CUDA. `.numpy()` is one by itself. `counted` says what ran there, `torch.sim.set_sync_debug_mode("error")`
forbids what CUDA would wait for. It can't show what a GPU's own kernels do: their rounding, their limits, their speed. Torch takes one such device a process, for good."""
import os
import subprocess
import tempfile
import types
from pathlib import Path

import torch

SOURCE = r'''
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>
using namespace c10; using at::Tensor; using std::optional; using std::string; using Ints = SymIntArrayRef;
const Device HERE(DeviceType::PrivateUse1, 0); const DispatchKeySet KEYS(DispatchKey::PrivateUse1);

struct Memory final : Allocator {                          // the host's, called the device's
  DataPtr allocate(size_t n) override { void* p = alloc_cpu(n); return {p, p, &free_cpu, HERE}; }
  DeleterFnPtr raw_deleter() const override { return &free_cpu; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
} memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::PrivateUse1> {
  Device exchangeDevice(Device) const override { return HERE; }
  Device getDevice() const override { return HERE; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, HERE); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

std::map<string, int64_t> calls; std::mutex one;
bool forbidden = false;
thread_local bool inside = false;                          // of an operation on the host, whose own copies don't count
struct Inside { bool was = inside; Inside() { inside = true; } ~Inside() { inside = was; } };
void count(const string& what) { if (!inside) { std::lock_guard<std::mutex> l(one); calls[what]++; } }
void waits(const string& what) { count("waits: " + what); TORCH_CHECK(inside || !forbidden, what, " has to wait for the device"); }
Tensor host(const Tensor& t) { return t.is_cpu() ? t : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU)); }
void check(const Tensor& t, const string& op, const string& name, bool written) {
  TORCH_CHECK(!t.defined() || t.device().type() == HERE.type() || (t.is_cpu() && !t.dim() && !written), "Expected all tensors to be on the same device: ",
              op, " got `", name, "` on ", t.device(), " and another tensor on ", HERE);
}

void run(const OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& args = op.schema().arguments(); const string& name = op.schema().name();
  bool search = name == "aten::nonzero" || name == "aten::masked_select" || name.rfind("aten::_unique", 0) == 0;
  for (size_t i = 0; i < args.size(); i++) {
    const IValue& v = (*stack)[stack->size() - args.size() + i]; const auto& a = args[i];
    if (v.isTensor()) check(v.toTensor(), name, a.name(), a.alias_info() && a.alias_info()->isWrite());
    if (v.isList()) for (const IValue& e : v.toListRef()) if (e.isTensor() && e.toTensor().defined()) {
      if (a.name() == "indices") search |= e.toTensor().is_cpu() || e.toTensor().scalar_type() == at::kBool;
      else check(e.toTensor(), name, a.name(), false);
    }
  }
  count(name);
  if (search) waits(name);
  Inside in; at::native::cpu_fallback(op, stack, true);   // true: an operation that should have given a view is an error
}
Tensor empty(IntArrayRef size, optional<ScalarType> t, optional<Layout>, optional<Device>, optional<bool>, optional<MemoryFormat> f) {
  return at::detail::empty_generic(size, &memory, KEYS, dtype_or_default(t), f); }
Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<ScalarType> t, optional<Layout>, optional<Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, dtype_or_default(t)); }
Tensor copy_from(const Tensor& from, const Tensor& to, bool at_ease) {
  if (from.is_cpu() != to.is_cpu() && !at_ease) waits("copy");
  host(to).copy_(host(from)); return to; }
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) { at::native::resize_(to, from.sizes()); return copy_from(from, to, false); }
Scalar item(const Tensor& t) { waits("item"); return at::native::_local_scalar_dense_cpu(host(t)); }
Tensor& set_whole(Tensor& t, at::Storage s) { return at::native::set_(t, s); }
Tensor& set_part(Tensor& t, at::Storage s, int64_t at, IntArrayRef size, IntArrayRef stride) { return at::cpu::set_(t, s, at, size, stride); }
Tensor conv(const Tensor& x, const Tensor& w, const optional<Tensor>& b, Ints stride, Ints pad, Ints apart, bool turned, Ints rest, SymInt groups) {
  check(x, "convolution", "input", false); check(w, "convolution", "weight", false); count("aten::convolution"); Inside in;
  return at::convolution_symint(host(x), host(w), b && b->defined() ? optional<Tensor>(host(*b)) : b, stride, pad, apart, turned, rest, groups).to(HERE); }
std::tuple<Tensor, Tensor, Tensor> conv_back(const Tensor& g, const Tensor& x, const Tensor& w, Ints stride, Ints pad, Ints apart, bool turned, Ints rest, SymInt groups, std::array<bool, 3> want) {
  count("aten::convolution_backward"); Inside in; SymInt bias = w.size(turned);
  auto [a, b, c] = at::convolution_backward_symint(host(g), host(x), host(w), Ints(&bias, 1), stride, pad, apart, turned, rest, groups, want);
  for (Tensor* t : {&a, &b, &c}) if (t->defined()) *t = t->to(HERE);
  return {a, b, c}; }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty); m.impl("empty_strided", empty_strided); m.impl("_copy_from", copy_from); m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl); m.impl("view", at::native::view); m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_); m.impl("unfold", at::native::unfold); m.impl("set_.source_Storage", set_whole); m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("_local_scalar_dense", item); m.impl("convolution_overrideable", conv); m.impl("convolution_backward_overrideable", conv_back);
}
Dict<string, int64_t> counted() { std::lock_guard<std::mutex> l(one); Dict<string, int64_t> out; for (auto& [k, n] : calls) out.insert(k, n); calls.clear(); return out; }
TORCH_LIBRARY(sim, m) { m.def("counted() -> Dict(str, int)", counted); m.def("forbid(bool yes) -> ()", [](bool yes) { forbidden = yes; }); }
bool ready = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);
'''


def build(folder):
    "The compiled device, in 20 seconds; OSError where there is no compiler, or it fails."
    home = Path(torch.__file__).parent
    (source := Path(folder)/"sim.cpp").write_text(SOURCE, encoding="utf-8")
    o = subprocess.run(["g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-w", source, "-o", source.with_suffix(".so"), f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include",
                        f"-L{home}/lib", "-lc10", "-ltorch_cpu", "-ltorch"], capture_output=True, text=True)
    if o.returncode: raise OSError(f"the simulated device does not compile with torch {torch.__version__}: {o.stderr[:500]}")
    return source.with_suffix(".so")


def counted(): return torch.ops.sim.counted()              # and forgotten: operations, and what was waited for


def pytest_configure(config=None):
    "Torch and Lightning learn of the device."
    from cxr_nbdev import config as settings, train
    from pytorch_lightning import Trainer
    from pytorch_lightning.accelerators import Accelerator
    from pytorch_lightning.strategies import SingleDeviceStrategy
    torch.utils.rename_privateuse1_backend("sim")
    module = dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None,
                  get_amp_supported_dtype=lambda: [torch.bfloat16], set_sync_debug_mode=lambda mode: torch.ops.sim.forbid(mode == "error"))
    torch._register_device_module("sim", types.SimpleNamespace(**module))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.ops.load_library(os.environ.get("CXR_SIM") or build(tempfile.mkdtemp()))
    to, check, init = torch.device("sim", 0), train.check_device, Trainer.__init__
    Sim = type("Sim", (Accelerator,), dict(setup_device=lambda *a: None, teardown=lambda *a: None, parse_devices=lambda n: n, get_parallel_devices=lambda n: [to], auto_device_count=lambda: 1,
                                           is_available=lambda: True, name=lambda: "sim"))
    settings.CHOICES["accelerator"] += ("sim",)
    train.check_device = lambda kind="auto", *a: "sim" if kind == "sim" else check(kind, *a)
    Trainer.__init__ = lambda self, accelerator="auto", **kw: init(self, **kw, **(dict(accelerator=Sim(), strategy=SingleDeviceStrategy(to)) if accelerator == "sim" else dict(accelerator=accelerator)))
