/* cuBLAS, cuBLASLt and cuDNN: handles, one plan for everything, and success. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static int new_handle(void *handle) {
  *(void **)handle = calloc(1, 1024);
  return 0;
}

int cublasCreate_v2(void *handle) { return new_handle(handle); }
int cublasLtCreate(void *handle) { return new_handle(handle); }
int cublasLtMatmulDescCreate(void *descriptor) { return new_handle(descriptor); }
int cublasLtMatrixLayoutCreate(void *layout) { return new_handle(layout); }
int cublasLtMatmulPreferenceCreate(void *preference) { return new_handle(preference); }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetStream_v2(void *handle, void **stream) { *stream = NULL; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *found) {
  memset(results, 0, 96);  /* one cublasLtMatmulHeuristicResult_t, without a workspace */
  *found = 1;
  return 0;
}

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return 13000; }
int cudnnGetProperty(int what, int *value) {
  int parts[] = {CUDNN_VERSION / 10000, CUDNN_VERSION / 100 % 100, CUDNN_VERSION % 100};
  *value = parts[what];
  return 0;
}
const char *cudnnGetErrorString(int error) { return "error of the stub"; }
int cudnnCreate(void *handle) { return new_handle(handle); }
int cudnnBackendCreateDescriptor(int kind, void *descriptor) { return new_handle(descriptor); }

enum { HEURISTIC_RESULTS = 202, CONFIG_ENGINE = 300, PLAN_WORKSPACE = 402, TYPE_INT64 = 3 };
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted, int64_t *count,
                             void *values) {
  if (count) *count = name == HEURISTIC_RESULTS || name == CONFIG_ENGINE || name == PLAN_WORKSPACE;
  if (values && type == TYPE_INT64) *(int64_t *)values = 0;
  return 0;
}

/* Batch normalization's memory: none. */
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    void *handle, int mode, int operations, void *x, void *z, void *y, void *scale, void *activation,
    size_t *size) {
  *size = 0;
  return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    void *handle, int mode, int operations, void *x, void *y, void *dy, void *dz, void *dx,
    void *scale, void *activation, size_t *size) {
  *size = 0;
  return 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    void *handle, int mode, int operations, void *activation, void *x, size_t *size) {
  *size = 0;
  return 0;
}
