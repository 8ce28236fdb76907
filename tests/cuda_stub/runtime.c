/* CUDA's runtime (libcudart) with one GPU that computes nothing.

   Memory is reserved, counted and never touched: reading it gives zeros, of a single byte "true", and
   a host that follows a device pointer crashes. Launches are checked against the limits of all GPUs. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cuda_runtime_api.h"

#define MOST_BLOCKS 65536

static struct { char *start; size_t size; } blocks[MOST_BLOCKS];
static int block_count;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local cudaError_t last_error;
static int capturing, spoilt;  /* spoilt is a capture by what waits for its stream */
static cudaStream_t captured;
static unsigned long long captures;

static size_t total(void) { return (size_t)(atof(getenv("STUB_GIB")) * (1ull << 30)); }
static int capability(void) { return atoi(getenv("STUB_CAPABILITY")); }

static cudaError_t fail(cudaError_t error) { return last_error = error; }

static cudaError_t new_handle(void *handle) {
  *(void **)handle = calloc(1, 64);
  return cudaSuccess;
}

/* ---- device and errors ---- */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) { cudaError_t e = last_error; last_error = cudaSuccess; return e; }
const char *cudaGetErrorName(cudaError_t error) { return "error of the stub"; }
const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation          ? "out of memory"
         : error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
         : error == cudaErrorStreamCaptureInvalidated ? "operation failed due to a previous error during capture"
                                                      : "invalid configuration argument";
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {  /* of an H100 */
  memset(p, 0, sizeof *p);
  strcpy(p->name, "Stub GPU");
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->totalGlobalMem = total();
  p->warpSize = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->multiProcessorCount = 132;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->l2CacheSize = 50 << 20;
  p->textureAlignment = 512;
  p->canMapHostMemory = p->unifiedAddressing = p->concurrentKernels = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  *total_bytes = total();
  *free_bytes = total() - used;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
  pthread_mutex_lock(&lock);
  char *start = MAP_FAILED;
  if (used + size <= total() && block_count < MOST_BLOCKS)
    start = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start != MAP_FAILED) {
    blocks[block_count].start = start;
    blocks[block_count++].size = size;
    used += size;
    *pointer = start;
  }
  pthread_mutex_unlock(&lock);
  return start == MAP_FAILED ? fail(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < block_count; i++)
    if (blocks[i].start == pointer) {
      munmap(pointer, blocks[i].size);
      used -= blocks[i].size;
      blocks[i] = blocks[--block_count];
      break;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  *pointer = calloc(1, size);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
cudaError_t cudaFreeHost(void *pointer) { free(pointer); return cudaSuccess; }
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  return cudaMalloc(pointer, 1 << 20);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  for (int i = 0; i < block_count; i++)
    if ((char *)pointer >= blocks[i].start && (char *)pointer < blocks[i].start + blocks[i].size) {
      attributes->type = cudaMemoryTypeDevice;
      attributes->devicePointer = (void *)pointer;
    }
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  if (kind == cudaMemcpyDeviceToHost) memset(to, size == 1, size);  /* one byte alone is a "yes" */
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return cudaMemcpy(to, from, size, kind);
}

/* ---- streams, events, graphs ---- */

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return new_handle(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return new_handle(stream); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return new_handle(stream); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return new_handle(event); }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return new_handle(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  *ms = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!capturing || stream != captured) return cudaSuccess;
  spoilt = 1;
  return fail(cudaErrorStreamCaptureUnsupported);
}
static enum cudaStreamCaptureStatus status(void) {
  return capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *answer) {
  *answer = status();
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *answer,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  *answer = status();
  if (id) *id = captures;
  if (count) *count = 0;
  return graph ? new_handle(graph) : cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  capturing = 1;
  captured = stream;
  spoilt = 0;
  captures++;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  capturing = 0;
  *graph = NULL;
  return spoilt ? fail(cudaErrorStreamCaptureInvalidated) : new_handle(graph);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *instance, cudaGraph_t graph,
                                 unsigned long long flags) {
  return new_handle(instance);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *instance, cudaGraph_t graph,
                                          unsigned long long flags) {
  return new_handle(instance);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = 1;
  return cudaSuccess;
}

/* ---- kernels ---- */

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = capability();
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *function,
                                                          int threads, size_t shared) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *count, const void *function, int threads, size_t shared, unsigned flags) {
  *count = 2;
  return cudaSuccess;
}

int stub_fits(unsigned x, unsigned y, unsigned z, unsigned long threads) {
  int fits = x && y && z && x <= 2147483647 && y <= 65535 && z <= 65535 && threads && threads <= 1024;
  if (!fits) fprintf(stderr, "stub: no GPU takes a grid of %u x %u x %u, %lu threads\n", x, y, z, threads);
  return fits;
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) {
  unsigned long threads = (unsigned long)block.x * block.y * block.z;
  int fits = stub_fits(grid.x, grid.y, grid.z, threads);
  return fits ? cudaSuccess : fail(cudaErrorInvalidConfiguration);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                void **arguments) {
  return cudaLaunchKernel(function, config->gridDim, config->blockDim, arguments, 0, 0);
}

static _Thread_local struct { dim3 grid, block; size_t shared; void *stream; } call;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  call.grid = grid;
  call.block = block;
  call.shared = shared;
  call.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *(void **)stream = call.stream;
  return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 64); }

/* ---- the way to the driver ---- */

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : NULL;
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
