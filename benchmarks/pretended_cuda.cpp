// What a CPU build of torch must be told so that autograd works on tensors of a CUDA device without one (see pretended_cuda.py): there is one device,
// and its streams, all the same one, never have anything to wait for. NoOpDeviceGuardImpl does nothing else already, but knows no devices to count.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct PretendedHooks final : at::CUDAHooksInterface {
  explicit PretendedHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};

struct PretendedGuard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device only() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, only()); }

  Device getDevice() const override { return only(); }
  Device exchangeDevice(Device) const override { return only(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void synchronizeStream(const Stream&) const override {}
  bool queryStream(const Stream&) const override { return true; }
  // Events are recorded and waited for between the engine's threads; they must not throw.
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

// torch has made its hooks when this is loaded, without a field and of the same size: these are put in their place.
static_assert(sizeof(PretendedHooks) == sizeof(at::CUDAHooksInterface));
static const at::CUDAHooksInterface* const hooks =
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) PretendedHooks(at::CUDAHooksArgs{});

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard)
}
