// SF_HOST_DEVICE: for the few inline functions that CPU code and kernels share.
#pragma once

#ifdef __CUDACC__
#define SF_HOST_DEVICE __host__ __device__
#else
#define SF_HOST_DEVICE
#endif
