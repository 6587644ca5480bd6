/* A stand-in for the CUDA driver, stricter than the real one: host memory plays the device's, copies move nothing until their stream
 * is synchronised, memory must be pinned, every thread must have set the context, a stream belongs to one thread at a time, and work
 * on the compute stream takes until the test says that it is done. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, ILLEGAL_ADDRESS = 700, STREAM_SHARED = 900 };
#define CONTEXT ((void *)0xC0DE)
#define MOST 4096

typedef struct event {
    int64_t recorded, passed; /* the latest record, and the latest that has passed */
} event;

typedef struct copy {
    char *to;
    const char *from;
    size_t n_bytes;
    event *after;
    int64_t wanted;
} copy;

typedef struct stream {
    copy copies[8];
    int n_copies, in_use;
    pthread_t user;
    event *awaited;
    int64_t wanted;
} stream;

static __thread void *current = NULL;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static event *events[MOST];
static int n_events;
static char *pinned;
static size_t pinned_bytes;

/* What the test reads and sets. */
int64_t clock_of_compute, n_streams, n_pinned, n_live_events, n_copied, n_waits;
int64_t fail_copy_at = -1, fail_stream_at = -1;
int32_t is_dead; /* a kernel has faulted: each call that records or takes down says so again, though it does its work */
int32_t compute_is_busy;

void make_current(void) { current = CONTEXT; }

void finish_compute(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_events; i++)
        events[i]->passed = events[i]->recorded;
    pthread_mutex_unlock(&lock);
}

int32_t cuCtxGetCurrent(void **context) { return *context = current, OK; }
int32_t cuCtxSetCurrent(void *context) { return current = context, context == CONTEXT ? OK : INVALID_CONTEXT; }

int32_t cuMemHostRegister_v2(void *address, size_t n_bytes, uint32_t flags) {
    if (pinned || flags != 3)
        return INVALID_VALUE;
    pinned = address;
    pinned_bytes = n_bytes;
    n_pinned = (int64_t)n_bytes;
    return OK;
}

int32_t cuMemHostUnregister(void *address) {
    if (address != pinned || n_streams)
        return INVALID_VALUE;
    pinned = NULL;
    n_pinned = 0;
    return is_dead ? ILLEGAL_ADDRESS : OK;
}

int32_t cuMemHostGetDevicePointer_v2(uint64_t *mapped, void *address, uint32_t flags) {
    return *mapped = (uint64_t)address, address == pinned && !flags ? OK : INVALID_VALUE;
}

int32_t cuStreamCreate(void **handle, uint32_t flags) {
    static stream pool[64];
    if (fail_stream_at-- == 0)
        return INVALID_VALUE;
    stream *s = &pool[n_streams++];
    memset(s, 0, sizeof *s);
    return *handle = s, flags == 1 ? OK : INVALID_VALUE;
}

int32_t cuStreamDestroy_v2(void *handle) {
    n_streams--;
    return is_dead ? ILLEGAL_ADDRESS : ((stream *)handle)->n_copies ? INVALID_VALUE : OK;
}

int32_t cuEventCreate(void **handle, uint32_t flags) {
    static event pool[MOST];
    event *e = events[n_events] = &pool[n_events];
    memset(e, 0, sizeof *e);
    n_events++;
    n_live_events++;
    return *handle = e, flags == 2 ? OK : INVALID_VALUE;
}

int32_t cuEventDestroy_v2(void *handle) {
    if (--n_live_events == 0)
        n_events = 0;
    return is_dead ? ILLEGAL_ADDRESS : handle ? OK : INVALID_VALUE;
}

int32_t cuEventRecord(void *handle, void *compute_stream) {
    event *e = handle;
    pthread_mutex_lock(&lock);
    e->recorded = ++clock_of_compute;
    if (!compute_is_busy)
        e->passed = e->recorded;
    pthread_mutex_unlock(&lock);
    return is_dead ? ILLEGAL_ADDRESS : compute_stream == (void *)0x57 ? OK : INVALID_VALUE;
}

/* The first to enqueue on a stream owns it until it synchronises. */
static int taken_by_another(stream *s) {
    if (!__atomic_exchange_n(&s->in_use, 1, __ATOMIC_ACQ_REL)) {
        s->user = pthread_self();
        return 0;
    }
    return !pthread_equal(s->user, pthread_self());
}

int32_t cuStreamWaitEvent(void *handle, void *awaited, uint32_t flags) {
    stream *s = handle;
    if (taken_by_another(s))
        return STREAM_SHARED;
    s->awaited = awaited;
    pthread_mutex_lock(&lock);
    s->wanted = s->awaited->recorded;
    n_waits += s->wanted > 0;
    pthread_mutex_unlock(&lock);
    return flags ? INVALID_VALUE : OK;
}

int32_t cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n_bytes, void *handle) {
    stream *s = handle;
    if (current != CONTEXT)
        return INVALID_CONTEXT;
    if (taken_by_another(s))
        return STREAM_SHARED;
    if (!pinned || (char *)from < pinned || (char *)from + n_bytes > pinned + pinned_bytes)
        return INVALID_VALUE; /* the real driver would copy, and block meanwhile */
    if (__atomic_fetch_sub(&fail_copy_at, 1, __ATOMIC_RELAXED) == 0)
        return ILLEGAL_ADDRESS;
    s->copies[s->n_copies++] = (copy){(char *)to, from, n_bytes, s->awaited, s->wanted};
    s->awaited = NULL;
    return OK;
}

int32_t cuStreamSynchronize(void *handle) {
    stream *s = handle;
    for (int i = 0; i < s->n_copies; i++) {
        copy *c = &s->copies[i];
        while (c->after && __atomic_load_n(&c->after->passed, __ATOMIC_ACQUIRE) < c->wanted)
            usleep(100);
        memcpy(c->to, c->from, c->n_bytes);
        __atomic_fetch_add(&n_copied, (int64_t)c->n_bytes, __ATOMIC_RELAXED);
    }
    s->n_copies = 0;
    s->awaited = NULL;
    __atomic_store_n(&s->in_use, 0, __ATOMIC_RELEASE);
    return OK;
}

int32_t cuGetErrorString(int32_t code, const char **text) {
    return *text = code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "stand-in error", OK;
}
