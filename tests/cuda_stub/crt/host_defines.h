/* What the wheels of CUDA's runtime leave out: how its headers mark functions and types. */

#ifndef HOST_DEFINES_H
#define HOST_DEFINES_H

#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDAAPI
#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __inline__ inline
#define __location__(a)
#define __specialization_static static

#endif
