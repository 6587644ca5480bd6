/* Worker threads that move experts into slots without ever taking Python's interpreter lock.
 *
 * Python owns all memory, and keeps a job's until it has settled; layouts are mirrored in native.py. The pool's lock guards the
 * queues and every job; `state` is written last, so that reading it needs no lock. Times are CLOCK_MONOTONIC seconds, which is what
 * time.perf_counter() reads on Linux.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum state { QUEUED, RUNNING, DONE, FAILED, CANCELLED };
enum { READ_SHORT = -1, READ_RAISED = -2, GPU_ERROR = -1000 }; /* error codes beside errno's: the file ended early; Python raised */
#define PAGE_BYTES 4096
#define SPIN_S 20e-6 /* about what a precise sleep overshoots */
#define WATCH_S 1e-3 /* more than a layer's time: how long a thread looks out for work, or for news, before it sleeps */
#define SLICE_S 0.05 /* how long a sleeper may take to notice that the link was cut */

typedef struct job {
    int64_t offset, n_bytes; /* of the expert's row in its backing tier */
    char *slot;
    void *fence; /* a GPU's event that must have passed before the slot may be written; or NULL */
    int64_t moved_bytes;
    double submitted_s, started_s, finished_s;
    int32_t state, demand;
    int32_t error;               /* 0, an errno, READ_SHORT, READ_RAISED, or GPU_ERROR less the driver's code */
    int64_t error_start, n_read; /* of the chunk that failed: where it starts in the row, and what could be read */
    /* the pool's own */
    int64_t next_start; /* bytes handed out to threads so far */
    int32_t n_running;  /* chunks under way */
    int32_t stopping;   /* cancelled or failed: no further chunk is handed out */
    struct job *queue_before, *queue_after, *before, *after;
} job;

_Static_assert(sizeof(job) == 144, "native.py mirrors the layout");

typedef struct emulated_link { /* see link.py */
    double bytes_per_s, latency_s;
    double busy_until_s, lateness_s;
    int64_t n_requests;
    int32_t taken, cut;
} emulated_link;

/* Fill `into` with `n_bytes` of the row of `job` from byte `start` on: 0, or an error code with `*n_read` set. */
typedef int32_t (*read_fn)(void *source, job *job, int64_t start, int64_t n_bytes, char *into, int64_t *n_read);
typedef int32_t (*check_fn)(job *job); /* verify an arrived row: 0 or READ_RAISED */

typedef struct queue {
    job *first, *last;
} queue;

typedef struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work; /* there may be a chunk to move */
    pthread_cond_t news; /* a transfer settled */
    queue prefetches, demands;
    job *unsettled;
    int64_t queued_bytes, chunk_bytes;
    read_fn read;
    void *source;
    check_fn check;      /* or NULL */
    emulated_link *link; /* or NULL */
    int32_t closed;
    int32_t n_demanding;     /* chunks of demand loads under way; prefetches begin only in between */
    int32_t n_idle, n_woken; /* workers that sleep, and wake-ups on their way to them */
    int32_t watching;        /* a worker looks out for work without sleeping */
    int32_t watch_due;       /* the one who did has found some; another should */
    int32_t news_due;        /* something settled that waiting threads do not know of yet */
    int32_t n_threads;
    pthread_t threads[];
} pool;

typedef struct chunk { /* a piece of a transfer, handed to one thread */
    job *job;
    int64_t start, end;
    double due_s; /* when an emulated link delivers it; 0 without one */
} chunk;

/* ---- time and the emulated link ---- */

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static struct timespec at(double time_s) {
    struct timespec t = {(time_t)time_s, 0};
    t.tv_nsec = (long)((time_s - (double)t.tv_sec) * 1e9);
    return t;
}

static void sleep_until(double deadline_s) {
    static __thread int precise = 0;
    if (!precise) /* Linux lets a thread's timers fire 50 us late to save wake-ups; ask for 1 ns instead */
        precise = prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0) == 0;
    struct timespec wake = at(deadline_s - SPIN_S);
    if (deadline_s - now_s() > SPIN_S)
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &wake, NULL) == EINTR) {
        }
    while (now_s() < deadline_s) {
    }
}

double link_reserve(emulated_link *l, int64_t n_bytes, double ready_s) {
    double begin_s = ready_s > l->busy_until_s ? ready_s : l->busy_until_s;
    return l->busy_until_s = begin_s + l->latency_s + (double)n_bytes / l->bytes_per_s;
}

void link_deliver(emulated_link *l, double due_s) {
    double t;
    while (!__atomic_load_n(&l->cut, __ATOMIC_RELAXED) && (t = now_s()) < due_s)
        sleep_until(due_s < t + SLICE_S ? due_s : t + SLICE_S);
    l->n_requests++;
    if ((t = now_s()) > due_s)
        l->lateness_s += t - due_s;
}

/* ---- backing tiers ---- */

typedef struct disk {
    int32_t fd, direct;
} disk;

/* A read may stop early; only at the end of the file it returns nothing, or (direct) part of a page. */
int32_t read_disk(void *source, job *j, int64_t start, int64_t n_bytes, char *into, int64_t *n_read) {
    disk *d = source;
    for (*n_read = 0; *n_read < n_bytes;) {
        int at_end = d->direct && *n_read % PAGE_BYTES;
        ssize_t n_more = at_end ? 0 : pread(d->fd, into + *n_read, n_bytes - *n_read, j->offset + start + *n_read);
        if (n_more < 0 && errno == EINTR)
            continue;
        if (n_more < 0)
            return errno;
        if (n_more == 0)
            return READ_SHORT;
        *n_read += n_more;
    }
    return 0;
}

typedef struct memory {
    char *bytes;
    int64_t n_bytes;
} memory;

int32_t read_memory(void *source, job *j, int64_t start, int64_t n_bytes, char *into, int64_t *n_read) {
    memory *m = source;
    int64_t left = m->n_bytes - (j->offset + start);
    *n_read = left < 0 ? 0 : left < n_bytes ? left : n_bytes;
    if (*n_read < n_bytes)
        return READ_SHORT;
    memcpy(into, m->bytes + j->offset + start, n_bytes);
    return 0;
}

/* A GPU's memory behind pinned host memory. The driver is found at run time (cuda.py); these are a few of its functions. */
typedef int32_t cu_result; /* 0 is success */
typedef struct gpu {
    memory host;
    void *context;
    void **streams; /* at most 64, each used by one thread at a time */
    int64_t n_streams;
    uint64_t taken; /* bit i: stream i */
    cu_result (*set_context)(void *context);
    cu_result (*wait_event)(void *stream, void *event, uint32_t flags);
    cu_result (*copy)(uint64_t to, const void *from, size_t n_bytes, void *stream);
    cu_result (*synchronize)(void *stream);
} gpu;

static int take_stream(gpu *g) {
    uint64_t taken = __atomic_load_n(&g->taken, __ATOMIC_RELAXED);
    for (;;) {
        int i = __builtin_ctzll(~taken); /* there are as many streams as threads */
        if (__atomic_compare_exchange_n(&g->taken, &taken, taken | 1ull << i, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            return i;
    }
}

/* One chunk over the link by the copy engine. Returns when it has arrived, so that the queue behind it stays in our hands: what the
 * driver has been given can be neither cancelled nor overtaken. A second thread keeps the link busy meanwhile. */
int32_t copy_to_gpu(void *source, job *j, int64_t start, int64_t n_bytes, char *into, int64_t *n_read) {
    gpu *g = source;
    int64_t left = g->host.n_bytes - (j->offset + start);
    *n_read = left < 0 ? 0 : left < n_bytes ? left : n_bytes;
    if (*n_read < n_bytes)
        return READ_SHORT;
    int i = take_stream(g);
    cu_result failed = g->set_context(g->context);
    if (!failed && j->fence)
        failed = g->wait_event(g->streams[i], j->fence, 0);
    if (!failed)
        failed = g->copy((uint64_t)into, g->host.bytes + j->offset + start, n_bytes, g->streams[i]);
    cu_result unfinished = g->synchronize(g->streams[i]); /* also after a failure: nothing may write into the slot any more */
    __atomic_fetch_and(&g->taken, ~(1ull << i), __ATOMIC_RELEASE);
    failed = failed ? failed : unfinished;
    return failed ? GPU_ERROR - failed : 0;
}

/* ---- the lock ---- */

static void lock(pool *p) { pthread_mutex_lock(&p->lock); }

/* Unlock, then wake whom it concerns: a thread woken earlier would only run into the lock. Of the idle workers one at a time
 * is woken, and wakes the next: a wake-up costs the waker some 7 us, which the compute thread, while it is busy with layers, should
 * not have to pay. */
static void unlock(pool *p) {
    int takeable = !(p->link && p->link->taken) && (p->demands.first || (p->prefetches.first && !p->n_demanding));
    int news = p->news_due;
    int work = p->n_idle && !p->n_woken && (p->closed || (!p->watching && (takeable || p->watch_due)));
    p->news_due = p->watch_due = 0;
    p->n_woken += work;
    pthread_mutex_unlock(&p->lock);
    if (news)
        pthread_cond_broadcast(&p->news);
    if (work)
        pthread_cond_signal(&p->work);
}

static void sleep_until_work(pool *p) {
    p->n_idle++;
    pthread_cond_wait(&p->work, &p->lock);
    p->n_idle--;
    if (p->n_woken)
        p->n_woken--;
}

/* Give up the lock and look out for work for a while, politely: whoever else wants this core gets it. */
static void watch(pool *p) {
    double end_s = now_s() + WATCH_S;
    p->watching = 1;
    unlock(p);
    while (!__atomic_load_n(&p->demands.first, __ATOMIC_RELAXED) &&
           (!__atomic_load_n(&p->prefetches.first, __ATOMIC_RELAXED) || __atomic_load_n(&p->n_demanding, __ATOMIC_RELAXED)) &&
           !__atomic_load_n(&p->closed, __ATOMIC_RELAXED) && now_s() < end_s)
        sched_yield();
    lock(p);
    p->watching = 0;
}

/* ---- queues; the caller holds the lock ---- */

static void enqueue(queue *q, job *j) {
    j->queue_before = q->last;
    j->queue_after = NULL;
    *(q->last ? &q->last->queue_after : &q->first) = j;
    q->last = j;
}

static void dequeue(queue *q, job *j) {
    *(j->queue_before ? &j->queue_before->queue_after : &q->first) = j->queue_after;
    *(j->queue_after ? &j->queue_after->queue_before : &q->last) = j->queue_before;
}

static queue *queue_of(pool *p, job *j) { return j->demand ? &p->demands : &p->prefetches; }

static void settle_if_quiet(pool *p, job *j) {
    if (j->n_running || j->next_start < j->n_bytes)
        return;
    *(j->before ? &j->before->after : &p->unsettled) = j->after;
    if (j->after)
        j->after->before = j->before;
    j->finished_s = now_s();
    int32_t state = j->error ? FAILED : j->stopping ? CANCELLED : DONE;
    __atomic_store_n(&j->state, state, __ATOMIC_RELEASE);
    p->news_due = 1;
}

/* Hand out no further chunk of `j`. */
static void stop(pool *p, job *j) {
    if (j->next_start < j->n_bytes) {
        dequeue(queue_of(p, j), j);
        p->queued_bytes -= j->n_bytes - j->next_start;
        j->next_start = j->n_bytes;
    }
    j->stopping = 1;
}

/* The next chunk of the first transfer in `q`. No job also while the link is taken, and no prefetch while a demand load moves:
 * beside a prefetch it would take half as long again, and a layer is waiting for it. */
static chunk take(pool *p, queue *q) {
    chunk c = {q->first, 0, 0, 0.0};
    if ((p->link && p->link->taken) || (q == &p->prefetches && p->n_demanding))
        c.job = NULL;
    if (!c.job)
        return c;
    job *j = c.job;
    c.start = j->next_start;
    c.end = j->n_bytes - c.start > p->chunk_bytes ? c.start + p->chunk_bytes : j->n_bytes;
    if (p->link) {
        p->link->taken = 1;
        c.due_s = link_reserve(p->link, c.end - c.start, j->submitted_s);
    }
    j->next_start = c.end;
    if (c.end == j->n_bytes)
        dequeue(q, j);
    j->n_running++;
    p->n_demanding += j->demand;
    if (c.start == 0) {
        j->started_s = now_s();
        __atomic_store_n(&j->state, RUNNING, __ATOMIC_RELEASE);
    }
    return c;
}

static chunk take_any(pool *p) {
    chunk c = take(p, &p->demands);
    return c.job ? c : take(p, &p->prefetches);
}

static void leave(pool *p, job *j, int32_t error) { /* a thread is done with its chunk of `j` */
    j->n_running--;
    p->n_demanding -= j->demand;
    if (error) {
        if (!j->error)
            j->error = error;
        stop(p, j);
    }
    settle_if_quiet(p, j);
}

/* ---- moving; the caller does not hold the lock ---- */

static void move(pool *p, chunk c) {
    job *j = c.job;
    int64_t n_bytes = c.end - c.start, n_read = 0;
    int32_t error = p->read(p->source, j, c.start, n_bytes, j->slot + c.start, &n_read);
    if (!error && p->link)
        link_deliver(p->link, c.due_s);
    lock(p);
    p->queued_bytes -= n_bytes;
    if (error && !j->error) {
        j->error_start = c.start;
        j->n_read = n_read;
    }
    if (!error)
        j->moved_bytes += n_bytes;
    if (p->link)
        p->link->taken = 0;
    if (p->check && j->moved_bytes == j->n_bytes && !j->stopping) {
        unlock(p); /* it still counts as running, so that its slot stays its own meanwhile */
        error = p->check(j);
        lock(p);
    }
    leave(p, j, error);
    unlock(p);
}

/* Whether a chunk taken now would be over by `deadline_s`; the caller holds the lock. */
static int ends_by(pool *p, double deadline_s) {
    if (!p->link)
        return 1;
    double begin_s = now_s() > p->link->busy_until_s ? now_s() : p->link->busy_until_s;
    return begin_s + p->link->latency_s + (double)p->chunk_bytes / p->link->bytes_per_s < deadline_s;
}

static void *run(void *argument) {
    pool *p = argument;
    lock(p);
    for (;;) {
        chunk c = take_any(p);
        if (!c.job && !p->watching) {
            watch(p);
            c = take_any(p);
        }
        if (c.job) {
            p->watch_due = 1;
            unlock(p);
            move(p, c);
            lock(p);
        } else if (p->closed) {
            break;
        } else {
            sleep_until_work(p);
        }
    }
    unlock(p);
    return NULL;
}

/* ---- what Python calls ---- */

int64_t pool_bytes(int32_t n_threads) { return sizeof(pool) + n_threads * sizeof(pthread_t); }

/* Start a pool in `p`, `pool_bytes` zero bytes that must stay where they are until it is closed and nobody waits any more.
 * Returns the number of threads that could be started. */
int32_t pool_open(pool *p, read_fn read, void *source, check_fn check, emulated_link *l, int64_t chunk_bytes, int32_t n_threads) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, &monotonic);
    pthread_cond_init(&p->news, &monotonic);
    p->read = read;
    p->source = source;
    p->check = check;
    p->link = l;
    p->chunk_bytes = chunk_bytes;
    for (; p->n_threads < n_threads; p->n_threads++)
        if (pthread_create(&p->threads[p->n_threads], NULL, run, p))
            break;
    return p->n_threads;
}

int64_t *pool_queued_bytes(pool *p) { return &p->queued_bytes; }

void pool_submit(pool *p, job *j) {
    j->submitted_s = now_s();
    lock(p);
    enqueue(queue_of(p, j), j);
    j->before = NULL;
    j->after = p->unsettled;
    if (p->unsettled)
        p->unsettled->before = j;
    p->unsettled = j;
    p->queued_bytes += j->n_bytes;
    unlock(p);
}

void pool_promote(pool *p, job *j) {
    lock(p);
    if (!j->demand && j->state < DONE) {
        if (j->next_start < j->n_bytes) {
            dequeue(&p->prefetches, j);
            enqueue(&p->demands, j);
        }
        j->demand = 1;
        p->n_demanding += j->n_running;
    }
    unlock(p);
}

void pool_cancel(pool *p, job *j) {
    lock(p);
    if (j->state < DONE) {
        stop(p, j);
        settle_if_quiet(p, j);
    }
    unlock(p);
}

static int any_settled(job **jobs, int64_t n_jobs) {
    for (int64_t i = 0; i < n_jobs; i++)
        if (__atomic_load_n(&jobs[i]->state, __ATOMIC_ACQUIRE) >= DONE)
            return 1;
    return 0;
}

/* Until one of `jobs` has settled, at most for `patience_s`: move demand chunks, if every worker is busy and no slow link would
 * hold up the caller for longer than that, else look out for news, and in the end sleep. Returns whether one has settled. */
int32_t pool_wait_any(pool *p, job **jobs, int64_t n_jobs, double patience_s) {
    double deadline_s = now_s() + patience_s, watch_end_s = now_s() + WATCH_S;
    struct timespec deadline = at(deadline_s);
    int32_t settled, late = 0;
    lock(p);
    while (!(settled = any_settled(jobs, n_jobs)) && !late) {
        chunk c = {NULL, 0, 0, 0.0};
        if (!p->n_idle && !p->watching && ends_by(p, deadline_s))
            c = take(p, &p->demands);
        if (c.job) {
            unlock(p);
            move(p, c);
            lock(p);
            late = now_s() > deadline_s;
        } else if (now_s() < watch_end_s) {
            unlock(p);
            while (!any_settled(jobs, n_jobs) && now_s() < watch_end_s)
                sched_yield();
            lock(p);
        } else {
            late = pthread_cond_timedwait(&p->news, &p->lock, &deadline) == ETIMEDOUT;
        }
    }
    unlock(p);
    return settled;
}

/* Cancel everything and end all threads. Waiting on a closed pool returns at once: everything has settled. */
void pool_close(pool *p) {
    lock(p);
    p->closed = 1;
    for (job *j = p->unsettled, *after; j; j = after) {
        after = j->after;
        stop(p, j);
        settle_if_quiet(p, j);
    }
    if (p->link)
        __atomic_store_n(&p->link->cut, 1, __ATOMIC_RELAXED);
    unlock(p);
    for (; p->n_threads; p->n_threads--)
        pthread_join(p->threads[p->n_threads - 1], NULL);
}
