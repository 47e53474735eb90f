/* The launcher's question for the compute capability: 10.0 if MOE_PRETEND_SM100 is set. */
#include <stdlib.h>
int __real_cudaDeviceGetAttribute(int* value, int attribute, int device);
int __wrap_cudaDeviceGetAttribute(int* value, int attribute, int device) {
  int status = __real_cudaDeviceGetAttribute(value, attribute, device);
  if (status == 0 && getenv("MOE_PRETEND_SM100")) {
    if (attribute == 75) *value = 10;
    if (attribute == 76) *value = 0;
  }
  return status;
}
