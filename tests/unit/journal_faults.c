/* Makes a disk fail, or the process die, under one kind of file: preloaded, and told what to do by
   `fault_mode`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* 0: none; 1: syncing fails, written data stays; 2: no room; 3: 1, and from then on writing too;
   4: syncing fails once. The process is killed: 6: before a sync; 7: after one; 8: when half of a
   write to the log was written; 9: likewise of the database itself. */
int fault_mode = 0;
int fault_count = 0;
/* How often a place to be killed at is passed unharmed. */
int fault_spared = 0;

static int ours(int fd, const char *which) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  const char *end = strstr(path, ".sqlite3");
  if (end == NULL || strstr(path, ".lock") != NULL) return 0;
  return which == NULL || strcmp(end + strlen(".sqlite3"), which) == 0;
}

static int struck(int mode, int fd, const char *which) {
  return fault_mode == mode && ours(fd, which) && fault_spared-- <= 0;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

static int sync_fails(int fd) {
  if (fault_mode == 0 || fault_mode == 2 || fault_mode >= 5 || !ours(fd, NULL)) return 0;
  fault_count++;
  if (fault_mode == 3) fault_mode = 5;
  if (fault_mode == 4) fault_mode = 0;
  errno = EIO;
  return 1;
}

static int write_fails(int fd) {
  if ((fault_mode != 2 && fault_mode != 5) || !ours(fd, NULL)) return 0;
  fault_count++;
  errno = fault_mode == 2 ? ENOSPC : EIO;
  return 1;
}

static int torn(int fd) { return struck(8, fd, "-wal") || struck(9, fd, ""); }

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
#define SYNC(name)                           \
  int name(int fd) {                         \
    if (sync_fails(fd)) return -1;           \
    if (struck(6, fd, NULL)) die();          \
    int result = REAL(int, name, int)(fd);   \
    if (struck(7, fd, NULL)) die();          \
    return result;                           \
  }

SYNC(fsync)
SYNC(fdatasync)

ssize_t write(int fd, const void *from, size_t n) {
  if (write_fails(fd)) return -1;
  if (torn(fd)) {
    REAL(ssize_t, write, int, const void *, size_t)(fd, from, n / 2);
    die();
  }
  return REAL(ssize_t, write, int, const void *, size_t)(fd, from, n);
}

ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
  if (write_fails(fd)) return -1;
  if (torn(fd)) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, from, n / 2, at);
    die();
  }
  return REAL(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, from, n, at);
}

ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
  if (write_fails(fd)) return -1;
  if (torn(fd)) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, from, n / 2, at);
    die();
  }
  return REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, from, n, at);
}
