/* A device plug-in for tests, compiled several times: FAKE_ABI, FAKE_COUNT devices, or a
 * FAKE_PROBE_ERROR. Device 1 can't be opened. */
#include <stdio.h>

#include "model/device_plugin.h"

#ifndef FAKE_NO_SYMBOLS
int pyramid_device_abi_version(void) { return FAKE_ABI; }

int pyramid_device_probe(int* count, char* error, int error_size) {
#ifdef FAKE_PROBE_ERROR
  *count = 3; /* not to be believed */
  snprintf(error, (size_t)error_size, "%s", FAKE_PROBE_ERROR);
  return 1;
#else
  (void)error;
  (void)error_size;
  *count = FAKE_COUNT;
  return 0;
#endif
}

int pyramid_device_open(int index, char* error, int error_size) {
  if (index != 1) return 0;
  snprintf(error, (size_t)error_size, "device %d is held by another process", index);
  return 1;
}

#ifdef FAKE_RECORDS
/* Runs the work once to record it and again at each replay, or fails there. */
static void (*recorded_forward)(void* context);

int pyramid_device_record(void (*forward)(void* context), void* context, void** recorded,
                          char* error, int error_size) {
  (void)error;
  (void)error_size;
  recorded_forward = forward;
  forward(context);
  *recorded = context;
  return 0;
}

int pyramid_device_replay(void* recorded, char* error, int error_size) {
  if (FAKE_RECORDS == 1) {
    recorded_forward(recorded);
    return 0;
  }
  snprintf(error, (size_t)error_size, "%s", "out of memory");
  return 1;
}

void pyramid_device_forget(void* recorded) { (void)recorded; }
#endif
#endif
