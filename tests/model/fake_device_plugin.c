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
#endif
