/* A CUDA driver's rules without a GPU: context stack, reference counts, what is alive, memory limits, failures, legal captures.

   Computes nothing: no answer, speed or accuracy is ever taken from it. Tests compile it as libcuda.so.1 for a process of their own
   and ask it by the sim_ functions. CUDA's result codes are written out where they are returned. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
       DESTROYED = 709, LAUNCH_FAILED = 719, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_IMPLICIT = 906,
       CAPTURE_WRONG_THREAD = 908 };
enum kind { DEVICE, HOST, STREAM, EVENT, GRAPH, EXEC, N_KINDS };
static const char *NAMES[] = {"device", "host", "stream", "event", "graph", "graph exec"};

struct thing { enum kind kind; char *memory; size_t bytes; int is_blocking, is_capturing, is_invalid; pthread_t thread; struct thing *next; };
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static struct thing *things;
static int alive[N_KINDS], primary, refs, other, copies, allocations_left = -1;
static long calls, failing = -1;
static int is_sticky, is_poisoned, capture_errors;
static char failed[64];
static __thread void *stack[256];
static __thread int depth;

/* Every call of the driver passes here: it is counted, and fails if it is its turn. */
static int enter(const char *name) {
  pthread_mutex_lock(&lock);
  int fails = calls++ == failing;
  if (fails) { snprintf(failed, sizeof failed, "%s", name); is_poisoned = is_sticky; }
  return fails || is_poisoned ? LAUNCH_FAILED : OK;
}
static int leave(int code) { pthread_mutex_unlock(&lock); return code; }
static int needs_context(void) {
  if (!depth || stack[depth - 1] != &primary) return INVALID_CONTEXT;
  return refs ? OK : DESTROYED;
}
#define BEGIN(check) int code = enter(__func__); if (!code) code = (check); if (code) return leave(code)
static struct thing *find(const void *handle, enum kind kind) {
  for (struct thing *t = things; t; t = t->next)
    if (t->kind == kind && (kind <= HOST ? (char *)handle >= t->memory && (char *)handle < t->memory + t->bytes : t == handle)) return t;
  return NULL;
}
static struct thing *make(enum kind kind, size_t bytes) {
  struct thing *t = calloc(1, sizeof *t);
  t->kind = kind; t->bytes = bytes; t->memory = bytes ? calloc(1, bytes) : NULL; t->next = things; things = t; alive[kind]++;
  return t;
}
static int drop(const void *handle, enum kind kind) {
  struct thing *t = find(handle, kind);
  if (!t || (kind <= HOST && t->memory != handle)) return INVALID_HANDLE;
  for (struct thing **p = &things; *p; p = &(*p)->next) if (*p == t) { *p = t->next; break; }
  alive[kind]--; free(t->memory); free(t);
  return OK;
}
/* A capture that is thread-local forbids its own thread what would synchronise or allocate, and is invalid after it. */
static int forbidden_in_capture(void) {
  int code = OK;
  for (struct thing *t = things; t; t = t->next)
    if (t->kind == STREAM && t->is_capturing && pthread_equal(t->thread, pthread_self())) { t->is_invalid = 1; code = CAPTURE_UNSUPPORTED; }
  return code;
}
static int allocates(void) {
  int code = needs_context();
  if (!code) code = forbidden_in_capture();
  if (!code && allocations_left >= 0 && allocations_left-- == 0) { allocations_left = 0; code = OUT_OF_MEMORY; }
  return code;
}

int cuInit(unsigned flags) { BEGIN(OK); return leave(OK); }
int cuDriverGetVersion(int *v) { const char *e = getenv("SIM_CUDA_VERSION"); *v = e ? atoi(e) : 13000; BEGIN(OK); return leave(OK); }
int cuDeviceGetCount(int *n) { *n = 1; BEGIN(OK); return leave(OK); }
int cuDeviceGet(int *d, int ordinal) { *d = ordinal; BEGIN(ordinal ? 101 : OK); return leave(OK); }
int cuDeviceGetName(char *s, int n, int d) { BEGIN(OK); snprintf(s, n, "Simulated GPU"); return leave(OK); }
int cuDeviceGetAttribute(int *v, int a, int d) { BEGIN(OK); *v = a == 75 ? 9 : a == 18 ? getenv("SIM_INTEGRATED") != NULL : 0; return leave(OK); }
int cuDeviceComputeCapability(int *major, int *minor, int d) { BEGIN(OK); *major = 9; *minor = 0; return leave(OK); }
int cuDevicePrimaryCtxRetain(void **c, int d) { BEGIN(OK); refs++; *c = &primary; return leave(OK); }
int cuDevicePrimaryCtxRelease_v2(int d) { BEGIN(refs ? OK : INVALID_CONTEXT); refs--; return leave(OK); }
int cuDevicePrimaryCtxRelease(int d) { return cuDevicePrimaryCtxRelease_v2(d); }
int cuCtxPushCurrent_v2(void *c) { BEGIN(c != &primary || refs ? OK : DESTROYED); stack[depth++] = c; return leave(OK); }
int cuCtxPopCurrent_v2(void **c) { BEGIN(depth ? OK : INVALID_CONTEXT); depth--; if (c) *c = stack[depth]; return leave(OK); }
int cuCtxGetCurrent(void **c) { *c = depth ? stack[depth - 1] : NULL; BEGIN(OK); return leave(OK); }
int cuCtxGetDevice(int *d) { *d = 0; BEGIN(needs_context()); return leave(OK); }
int cuCtxDetach(void *c) { BEGIN(INVALID_CONTEXT); return leave(OK); } /* a primary context is never detached so */
int cuMemGetInfo_v2(size_t *free_, size_t *total) { BEGIN(needs_context()); *free_ = 1u << 30; *total = 1ull << 31; return leave(OK); }
int cuMemAlloc_v2(uintptr_t *p, size_t n) { BEGIN(allocates()); *p = (uintptr_t)make(DEVICE, n)->memory; return leave(OK); }
int cuMemFree_v2(uintptr_t p) { BEGIN(needs_context()); return leave(drop((void *)p, DEVICE)); }
int cuMemHostAlloc(void **p, size_t n, unsigned flags) { BEGIN(allocates()); *p = make(HOST, n)->memory; return leave(OK); }
int cuMemFreeHost(void *p) { BEGIN(needs_context()); return leave(drop(p, HOST)); }
int cuMemHostGetDevicePointer_v2(uintptr_t *d, void *p, unsigned flags) { BEGIN(find(p, HOST) ? OK : INVALID_VALUE); *d = (uintptr_t)p; return leave(OK); }
int cuStreamCreate(void **s, unsigned flags) { BEGIN(needs_context()); struct thing *t = make(STREAM, 0); t->is_blocking = !flags; *s = t; return leave(OK); }
int cuStreamDestroy_v2(void *s) { BEGIN(needs_context()); return leave(drop(s, STREAM)); }
int cuStreamSynchronize(void *s) { BEGIN(needs_context()); return leave(find(s, STREAM) ? forbidden_in_capture() : INVALID_HANDLE); }
int cuEventCreate(void **e, unsigned flags) { BEGIN(needs_context()); *e = make(EVENT, 0); return leave(OK); }
int cuEventDestroy_v2(void *e) { BEGIN(needs_context()); return leave(drop(e, EVENT)); }
int cuEventRecord(void *e, void *s) { BEGIN(needs_context()); return leave(find(e, EVENT) && find(s, STREAM) ? OK : INVALID_HANDLE); }
int cuEventElapsedTime(float *ms, void *a, void *b) { *ms = 1; BEGIN(needs_context()); return leave(find(a, EVENT) && find(b, EVENT) ? OK : INVALID_HANDLE); }
int cuEventElapsedTime_v2(float *ms, void *a, void *b) { return cuEventElapsedTime(ms, a, b); }

static int copy_is_legal(const void *device, const void *host, size_t n, void *stream) {
  struct thing *d = find(device, DEVICE), *h = find(host, HOST);
  if (!d || !h || !find(stream, STREAM)) return INVALID_VALUE; /* memory that isn't page-locked is refused too: the copy would not be asynchronous */
  if ((char *)device + n > d->memory + d->bytes || (char *)host + n > h->memory + h->bytes) return INVALID_VALUE;
  copies++;
  return needs_context();
}
int cuMemcpyHtoDAsync_v2(uintptr_t d, const void *h, size_t n, void *s) { BEGIN(copy_is_legal((void *)d, h, n, s)); memcpy((void *)d, h, n); return leave(OK); }
int cuMemcpyDtoHAsync_v2(void *h, uintptr_t d, size_t n, void *s) { BEGIN(copy_is_legal((void *)d, h, n, s)); memcpy(h, (void *)d, n); return leave(OK); }

int cuStreamBeginCapture_v2(void *s, int mode) {
  struct thing *t = find(s, STREAM);
  BEGIN(needs_context());
  if (!t || t->is_capturing || mode != 1) return leave(INVALID_VALUE); /* 1 is thread-local */
  t->is_capturing = 1; t->is_invalid = 0; t->thread = pthread_self();
  return leave(OK);
}
int cuStreamEndCapture(void *s, void **g) {
  struct thing *t = find(s, STREAM);
  *g = NULL;
  BEGIN(needs_context());
  if (!t || !t->is_capturing) return leave(INVALID_VALUE);
  if (!pthread_equal(t->thread, pthread_self())) return leave(CAPTURE_WRONG_THREAD);
  t->is_capturing = 0;
  if (t->is_invalid) return leave(CAPTURE_INVALIDATED);
  *g = make(GRAPH, 0);
  return leave(OK);
}
int cuGraphInstantiateWithFlags(void **x, void *g, unsigned long long flags) { BEGIN(allocates()); if (!find(g, GRAPH)) return leave(INVALID_VALUE); *x = make(EXEC, 0); return leave(OK); }
int cuGraphDestroy(void *g) { BEGIN(OK); return leave(drop(g, GRAPH)); }
int cuGraphUpload(void *x, void *s) { BEGIN(needs_context()); return leave(find(x, EXEC) && find(s, STREAM) ? OK : INVALID_HANDLE); }
int cuGraphLaunch(void *x, void *s) { return cuGraphUpload(x, s); }
int cuGraphExecDestroy(void *x) { BEGIN(needs_context()); return leave(drop(x, EXEC)); }
int cuGetErrorName(int e, const char **s) { *s = e == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR"; return OK; }
int cuGetErrorString(int e, const char **s) { *s = e == OUT_OF_MEMORY ? "out of memory" : "simulated failure"; return OK; }

int cuGetProcAddress_v2(const char *name, void **p, int version, uint64_t flags, void *status) {
  char versioned[256];
  void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (!strcmp(name, "cuGraphInstantiate")) name = "cuGraphInstantiateWithFlags";
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  *p = dlsym(self, versioned);
  if (!*p) *p = dlsym(self, name);
  if (status) *(int *)status = *p ? 0 : 1;
  return *p ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **p, int version, uint64_t flags) { return cuGetProcAddress_v2(name, p, version, flags, NULL); }

/* What a test asks and sets. */
int sim_depth(void) { return depth; }
int sim_refs(void) { return refs; }
int sim_alive(int kind) { return alive[kind]; }
int sim_copies(void) { return copies; }
long sim_calls(void) { return calls; }
int sim_owns(uintptr_t p, size_t n) { /* device memory, or page-locked memory that the GPU addresses */
  struct thing *t = find((void *)p, DEVICE);
  if (!t) t = find((void *)p, HOST);
  return t && (char *)p + n <= t->memory + t->bytes;
}
int sim_has_stream(void *s) { return find(s, STREAM) != NULL; }
void sim_fail_call(long n, int sticky) { failing = n < 0 ? -1 : calls + n; is_sticky = sticky; is_poisoned = 0; failed[0] = 0; }
const char *sim_failed(void) { return failed; }
void sim_allow_allocations(int n) { allocations_left = n; }
/* Another library's context becomes current, as torch's on another GPU; and is asked for. */
void sim_push_other(void) { stack[depth++] = &other; }
int sim_other_is_current(void) { return depth && stack[depth - 1] == &other; }
void sim_pop_other(void) { depth--; }
/* Work on the legacy stream, where torch puts its own by default. */
int sim_legacy_work(void) {
  pthread_mutex_lock(&lock);
  int code = OK;
  for (struct thing *t = things; t; t = t->next)
    if (t->kind == STREAM && t->is_capturing && t->is_blocking) { t->is_invalid = 1; code = CAPTURE_IMPLICIT; }
  capture_errors += code != OK;
  return leave(code);
}
int sim_capture_errors(void) { return capture_errors; }
__attribute__((destructor)) static void report(void) {
  if (!getenv("SIM_REPORT")) return;
  fprintf(stderr, "at exit: %d references", refs);
  for (int i = 0; i < N_KINDS; i++) fprintf(stderr, ", %d %s", alive[i], NAMES[i]);
  fprintf(stderr, "\n");
}
