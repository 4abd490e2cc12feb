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

// The following three may be missing (all of them): a device without recorded work.
//
// Calls `forward(context)` a few times, then once more while recording what it queues on the
// calling thread's current device, for pyramid_device_replay. `forward` works on tensors that stay
// where they are, and waits for nothing. `*recorded` belongs to the caller until
// pyramid_device_forget.
int pyramid_device_record(void (*forward)(void* context), void* context, void** recorded,
                          char* error, int error_size);

// Queues the recorded work on the calling thread's current stream. One thread at a time.
int pyramid_device_replay(void* recorded, char* error, int error_size);

void pyramid_device_forget(void* recorded);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // PYRAMID_MODEL_DEVICE_PLUGIN_H_
