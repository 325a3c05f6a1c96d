// A CUDA driver without a GPU, for the bindings: every function that normpass calls, and the lookup of their names.
//
// Memory is the CPU's. A kernel is the probe: what is launched fills its first argument as probe.cu does. The function
// named in NORMPASS_STUB_FAILS returns CUDA_ERROR_UNKNOWN, the one in NORMPASS_STUB_LACKS is not to be found.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include <dlfcn.h>

using Result = int;
using Handle = void*;

static Result code(const char* name) {
  const char* fails = std::getenv("NORMPASS_STUB_FAILS");
  return fails != nullptr && std::strcmp(fails, name) == 0 ? 999 : 0;
}

static Handle context = nullptr;
static int mode = 0;

extern "C" {

Result cuInit(unsigned) { return code("cuInit"); }
Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
Result cuDeviceGet(int* device, int index) {
  *device = index;
  return code("cuDeviceGet");
}
Result cuDevicePrimaryCtxRetain(Handle* result, int) {
  *result = reinterpret_cast<Handle>(77);
  return code("cuDevicePrimaryCtxRetain");
}
Result cuCtxGetCurrent(Handle* result) {
  *result = context;
  return code("cuCtxGetCurrent");
}
Result cuCtxSetCurrent(Handle wanted) {
  context = wanted;
  return code("cuCtxSetCurrent");
}
Result cuThreadExchangeStreamCaptureMode(int* wanted) {
  int before = mode;
  mode = *wanted;
  *wanted = before;
  return code("cuThreadExchangeStreamCaptureMode");
}
Result cuStreamCreate(Handle* stream, unsigned flags) {
  *stream = reinterpret_cast<Handle>(99);
  return flags == 1 ? code("cuStreamCreate") : 1;
}
Result cuStreamSynchronize(Handle) { return code("cuStreamSynchronize"); }
Result cuMemAlloc_v2(uint64_t* address, size_t size) {
  *address = reinterpret_cast<uint64_t>(std::malloc(size));
  return mode == 2 ? code("cuMemAlloc") : 900;  // relaxed
}
Result cuMemFree_v2(uint64_t address) {
  std::free(reinterpret_cast<void*>(address));
  return code("cuMemFree");
}
Result cuMemsetD8Async(uint64_t address, unsigned char value, size_t size, Handle) {
  std::memset(reinterpret_cast<void*>(address), value, size);
  return code("cuMemsetD8Async");
}
Result cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t size, Handle) {
  std::memcpy(target, reinterpret_cast<void*>(source), size);
  return code("cuMemcpyDtoHAsync");
}
Result cuModuleLoadData(Handle* module, const void* image) {
  *module = const_cast<void*>(image);
  return std::memcmp(image, "\177ELF", 4) == 0 ? code("cuModuleLoadData") : 200;
}
Result cuModuleGetFunction(Handle* function, Handle module, const char*) {
  *function = module;
  return code("cuModuleGetFunction");
}
Result cuFuncGetAttribute(int* value, int, Handle) {
  *value = 32;
  return code("cuFuncGetAttribute");
}
Result cuLaunchKernel(Handle, unsigned, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, Handle stream,
                      void** arguments, void** extra) {
  if (extra != nullptr) return 1;
  if (threads != 128) return code("cuLaunchKernel");  // not the probe
  auto result = *static_cast<double**>(arguments[0]);
  auto scale = *static_cast<double*>(arguments[1]);
  auto count = *static_cast<int64_t*>(arguments[2]);
  for (int64_t i = 0; i < count; ++i) result[i] = scale * static_cast<double>(i);
  return code("cuLaunchKernel");
}
Result cuStreamGetCaptureInfo_v2(Handle, int* status, uint64_t* id, Handle* graph, const Handle** dependencies,
                                 size_t* count) {
  *status = 1, *id = 5, *graph = reinterpret_cast<Handle>(55);
  if (dependencies != nullptr) *dependencies = nullptr;
  if (count != nullptr) *count = 0;
  return code("cuStreamGetCaptureInfo");
}
Result cuStreamGetCaptureInfo_v3(Handle stream, int* status, uint64_t* id, Handle* graph, const Handle** dependencies,
                                 const void** edges, size_t* count) {
  if (edges != nullptr) *edges = nullptr;
  return cuStreamGetCaptureInfo_v2(stream, status, id, graph, dependencies, count);
}
static void (*destroy)(void*) = nullptr;
static void* watched = nullptr;
Result cuUserObjectCreate(Handle* object, void* data, void (*destructor)(void*), unsigned, unsigned) {
  destroy = destructor, watched = data;
  *object = reinterpret_cast<Handle>(66);
  return code("cuUserObjectCreate");
}
Result cuGraphRetainUserObject(Handle graph, Handle object, unsigned, unsigned) {
  bool known = graph == reinterpret_cast<Handle>(55) && object == reinterpret_cast<Handle>(66);
  return known ? code("cuGraphRetainUserObject") : 1;
}
void stub_end_graph() { destroy(watched); }

// The bindings ask for the newest name they know; the driver gives what fits to `version`.
Result cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t, int* found) {
  const char* lacks = std::getenv("NORMPASS_STUB_LACKS");
  char versioned[128];
  *function = nullptr;
  bool lacking = lacks != nullptr && std::strncmp(name, lacks, std::strlen(lacks)) == 0;
  for (const char* suffix : {version >= 12030 ? "_v3" : "_v2", "_v2", ""}) {
    std::strcat(std::strcpy(versioned, name), suffix);
    if (*function == nullptr && !lacking) *function = dlsym(RTLD_DEFAULT, versioned);
    if (*function == nullptr && !lacking) {
      static Handle self = dlopen("libcuda.so.1", RTLD_NOW);
      *function = dlsym(self, versioned);
    }
  }
  if (found != nullptr) *found = *function == nullptr ? 1 : 0;
  return *function == nullptr ? 500 : 0;
}
Result cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
}
