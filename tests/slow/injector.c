/* File operations below one folder are numbered; at a chosen one the process dies, is interrupted, or gets an error.
   Preloaded into tests/slow/faults.py, which arms it in each forked child. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static atomic_int count;
static int target, fault, sticky, log_fd = -1;
enum { KILL = -1, INTERRUPT = -2 }; /* any other fault is an errno */

/* Number operations below `path` from now on. At number `at` do `what`; with `again` also whenever space is needed. */
void arm(const char *path, int at, int what, int again, int log) {
  snprintf(folder, sizeof folder, "%s", path);
  target = at, fault = what, sticky = again, log_fd = log;
  count = 0;
}

static int needs_space(const char *op) { return strstr("write create mkdir allocate clone truncate", op) != NULL; }

/* 0: go on. An errno: fail with it. KILL: do half of it, where that is possible, and die. */
static int step(const char *op, const char *path) {
  size_t length = strlen(folder);
  if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
  int number = ++count;
  if (log_fd >= 0) {
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%s %s\n", op, path + length);
    syscall(SYS_write, log_fd, line, size);
  }
  if (!target || !(number == target || (sticky && number > target && needs_space(op)))) return 0;
  if (fault == INTERRUPT) return syscall(SYS_kill, getpid(), SIGINT), 0;
  return fault;
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static void path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
}

static void path_at(int dir, const char *name, char *path) {
  char base[PATH_MAX] = "";
  if (name[0] == '/') { snprintf(path, PATH_MAX, "%s", name); return; }
  if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; } else path_of(dir, base);
  if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) path[0] = 0;
}

/* The operation `op` on `path`: what the real function returns, or the fault. */
#define DO(op, path, failed, half, real) { int what = step(op, path); if (what == KILL) { half; die(); } \
  if (what) { errno = what; return failed; } return real; }
#define ON_FD(type, name, op, half, parameters, ...) type name parameters { static type (*real) parameters; \
  if (!real) { real = dlsym(RTLD_NEXT, #name); } char path[PATH_MAX]; path_of(fd, path); \
  DO(op, path, -1, half, real(__VA_ARGS__)) }
#define ON_PATH(type, name, op, failed, dir, parameters, ...) type name parameters { static type (*real) parameters; \
  if (!real) { real = dlsym(RTLD_NEXT, #name); } char path[PATH_MAX]; path_at(dir, file, path); \
  DO(op, path, failed, , real(__VA_ARGS__)) }

ON_FD(ssize_t, write, "write", real(fd, data, size / 2), (int fd, const void *data, size_t size), fd, data, size)
ON_FD(ssize_t, writev, "write", , (int fd, const struct iovec *v, int n), fd, v, n)
ON_FD(ssize_t, pwrite, "write", real(fd, data, size / 2, at), (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
ON_FD(ssize_t, pwrite64, "write", real(fd, data, size / 2, at), (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
ON_FD(ssize_t, read, "read", , (int fd, void *data, size_t size), fd, data, size)
ON_FD(ssize_t, pread64, "read", , (int fd, void *data, size_t size, off_t at), fd, data, size, at)
ON_FD(ssize_t, preadv, "read", , (int fd, const struct iovec *v, int n, off_t at), fd, v, n, at)
ON_FD(ssize_t, preadv64, "read", , (int fd, const struct iovec *v, int n, off_t at), fd, v, n, at)
ON_FD(ssize_t, preadv2, "read", , (int fd, const struct iovec *v, int n, off_t at, int flags), fd, v, n, at, flags)
ON_FD(ssize_t, preadv64v2, "read", , (int fd, const struct iovec *v, int n, off_t at, int flags), fd, v, n, at, flags)
ON_FD(int, fsync, "fsync", , (int fd), fd)
ON_FD(int, fdatasync, "fsync", , (int fd), fd)
ON_FD(int, fallocate, "allocate", , (int fd, int mode, off_t at, off_t size), fd, mode, at, size)
ON_FD(int, fallocate64, "allocate", , (int fd, int mode, off_t at, off_t size), fd, mode, at, size)
ON_FD(int, ftruncate, "truncate", , (int fd, off_t size), fd, size)
ON_FD(int, ftruncate64, "truncate", , (int fd, off_t size), fd, size)
ON_FD(int, fchmod, "chmod", , (int fd, mode_t mode), fd, mode)
ON_FD(int, flock, "lock", , (int fd, int how), fd, how)
ON_FD(ssize_t, sendfile, "write", , (int fd, int from, off_t *at, size_t size), fd, from, at, size)
ON_FD(ssize_t, sendfile64, "write", , (int fd, int from, off_t *at, size_t size), fd, from, at, size)
ON_PATH(int, mkdir, "mkdir", -1, AT_FDCWD, (const char *file, mode_t mode), file, mode)
ON_PATH(int, rmdir, "rmdir", -1, AT_FDCWD, (const char *file), file)
ON_PATH(int, unlink, "unlink", -1, AT_FDCWD, (const char *file), file)
ON_PATH(int, unlinkat, "unlink", -1, dir, (int dir, const char *file, int flags), dir, file, flags)
ON_PATH(int, rename, "rename", -1, AT_FDCWD, (const char *file, const char *to), file, to)
ON_PATH(int, renameat, "rename", -1, dir, (int dir, const char *file, int to_dir, const char *to), dir, file, to_dir, to)
ON_PATH(int, renameat2, "rename", -1, dir, (int dir, const char *file, int to_dir, const char *to, unsigned how), dir, file, to_dir, to, how)
ON_PATH(int, truncate64, "truncate", -1, AT_FDCWD, (const char *file, off_t size), file, size)
ON_PATH(int, chmod, "chmod", -1, AT_FDCWD, (const char *file, mode_t mode), file, mode)
ON_PATH(int, fchmodat, "chmod", -1, dir, (int dir, const char *file, mode_t mode, int flags), dir, file, mode, flags)
ON_PATH(DIR *, opendir, "list", NULL, AT_FDCWD, (const char *file), file)

DIR *fdopendir(int fd) {
  static DIR *(*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fdopendir");
  char path[PATH_MAX];
  path_of(fd, path);
  DO("list", path, NULL, , real(fd))
}

ssize_t copy_file_range(int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned flags) {
  static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
  if (!real) real = dlsym(RTLD_NEXT, "copy_file_range");
  char path[PATH_MAX];
  path_of(fd, path);
  DO("write", path, -1, , real(from, at, fd, to, size, flags))
}

int ioctl(int fd, unsigned long request, ...) {
  static int (*real)(int, unsigned long, void *);
  if (!real) real = dlsym(RTLD_NEXT, "ioctl");
  va_list more;
  va_start(more, request);
  void *argument = va_arg(more, void *);
  va_end(more);
  char path[PATH_MAX] = "";
  if (request == 0x40049409 || request == 0x4020940d) path_of(fd, path); /* FICLONE, FICLONERANGE */
  DO("clone", path, -1, , real(fd, request, argument))
}

static int open_at(int dir, const char *file, int flags, mode_t mode) {
  static int (*real)(int, const char *, int, ...);
  if (!real) real = dlsym(RTLD_NEXT, "openat64");
  char path[PATH_MAX];
  path_at(dir, file, path);
  int writes = flags & (O_WRONLY | O_RDWR | O_CREAT);
  DO(writes ? "create" : "open", path, -1, , real(dir, file, flags, mode))
}

#define OPEN(name, dir, ...) int name(__VA_ARGS__, int flags, ...) { va_list more; va_start(more, flags); \
  mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; va_end(more); return open_at(dir, file, flags, mode); }
OPEN(open, AT_FDCWD, const char *file)
OPEN(open64, AT_FDCWD, const char *file)
OPEN(openat, dir, int dir, const char *file)
OPEN(openat64, dir, int dir, const char *file)
