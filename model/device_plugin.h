// What a device plug-in (libpyramid_cuda.so, libpyramid_npu.so) exports: a C interface, so that the
// programs need neither its headers nor its libraries. Loading the plug-in registers the device's
// operators with LibTorch.
//
// Every function returns 0, or 1 after writing one line of text into `error` (`error_size` bytes,
// always terminated). Thread-safe.
#ifndef PYRAMID_MODEL_DEVICE_PLUGIN_H_
#define PYRAMID_MODEL_DEVICE_PLUGIN_H_

#define PYRAMID_DEVICE_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

// PYRAMID_DEVICE_ABI_VERSION as it was when the plug-in was compiled. The only function whose
// meaning never changes.
int pyramid_device_abi_version(void);

// Usable devices. A machine without one is an error that says why (no driver, driver too old …).
int pyramid_device_probe(int* count, char* error, int error_size);

// Initialises device `index` and makes it the calling thread's current one. May be called again.
int pyramid_device_open(int index, char* error, int error_size);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // PYRAMID_MODEL_DEVICE_PLUGIN_H_
