/* Preloaded before libc: from the n-th change to the files below a folder on, every one of them fails.
 *
 * LevelDB writes through C++, out of Python's reach, so a full or failing disk is made here. A change is a write, a sync,
 * a rename, or the creation of a file. The n-th, when it is a write, still writes its first half: a torn record.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static long first_failing;
static int failure;
static atomic_long changes;

/* `nth` 0 only counts. */
void fault_arm(const char *below, long nth, int number) {
    strncpy(folder, below, sizeof folder - 1);
    first_failing = nth;
    failure = number;
    atomic_store(&changes, 0);
}

long fault_count(void) { return atomic_load(&changes); }

/* How far beyond the last change that succeeds this one is: 0 or less when it does, or is none of ours. */
static long beyond(const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder)) != 0) return 0;
    long nth = atomic_fetch_add(&changes, 1) + 1;
    return first_failing ? nth - first_failing + 1 : 0;
}

static long beyond_of(int descriptor) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return beyond(path);
}

#define REAL(name, type) static type real; if (!real) real = (type)dlsym(RTLD_NEXT, name)
#define FAIL_IF(condition) do { if (condition) { errno = failure; return -1; } } while (0)

typedef ssize_t (*write_type)(int, const void *, size_t);
typedef int (*sync_type)(int);
typedef int (*rename_type)(const char *, const char *);
typedef int (*open_type)(const char *, int, ...);

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL("write", write_type);
    long far = beyond_of(descriptor);
    if (far == 1 && size > 1) return real(descriptor, data, size / 2);
    FAIL_IF(far > 0);
    return real(descriptor, data, size);
}

typedef ssize_t (*pwrite_type)(int, const void *, size_t, off_t);

#define PWRITE(name)                                                            \
    ssize_t name(int descriptor, const void *data, size_t size, off_t offset) { \
        REAL(#name, pwrite_type);                                               \
        long far = beyond_of(descriptor);                                       \
        if (far == 1 && size > 1) return real(descriptor, data, size / 2, offset); \
        FAIL_IF(far > 0);                                                       \
        return real(descriptor, data, size, offset);                            \
    }

PWRITE(pwrite)
PWRITE(pwrite64)

int fsync(int descriptor) {
    REAL("fsync", sync_type);
    FAIL_IF(beyond_of(descriptor) > 0);
    return real(descriptor);
}

int fdatasync(int descriptor) {
    REAL("fdatasync", sync_type);
    FAIL_IF(beyond_of(descriptor) > 0);
    return real(descriptor);
}

int rename(const char *from, const char *to) {
    REAL("rename", rename_type);
    FAIL_IF(beyond(to) > 0);
    return real(from, to);
}

static int opened(open_type real, const char *path, int flags, mode_t mode) {
    if ((flags & O_CREAT) && access(path, F_OK) != 0) FAIL_IF(beyond(path) > 0);
    return real(path, flags, mode);
}

#define OPEN(name)                                            \
    int name(const char *path, int flags, ...) {              \
        REAL(#name, open_type);                               \
        va_list rest;                                         \
        va_start(rest, flags);                                \
        mode_t mode = flags & O_CREAT ? va_arg(rest, int) : 0; \
        va_end(rest);                                         \
        return opened(real, path, flags, mode);               \
    }

OPEN(open)
OPEN(open64)
