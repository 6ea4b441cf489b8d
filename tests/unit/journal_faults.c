/* Makes a disk fail under one kind of file: preloaded, and told what to do by `fault_mode`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* 0: none; 1: syncing fails, written data stays; 2: no room; 3: 1, and from then on writing too;
   4: syncing fails once */
int fault_mode = 0;
int fault_count = 0;

static int ours(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return strstr(path, ".sqlite3") != NULL && strstr(path, ".lock") == NULL;
}

static int sync_fails(int fd) {
  if (fault_mode == 0 || fault_mode == 2 || fault_mode == 5 || !ours(fd)) return 0;
  fault_count++;
  if (fault_mode == 3) fault_mode = 5;
  if (fault_mode == 4) fault_mode = 0;
  errno = EIO;
  return 1;
}

static int write_fails(int fd) {
  if ((fault_mode != 2 && fault_mode != 5) || !ours(fd)) return 0;
  fault_count++;
  errno = fault_mode == 2 ? ENOSPC : EIO;
  return 1;
}

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

int fsync(int fd) { return sync_fails(fd) ? -1 : REAL(int, fsync, int)(fd); }
int fdatasync(int fd) { return sync_fails(fd) ? -1 : REAL(int, fdatasync, int)(fd); }
ssize_t write(int fd, const void *from, size_t n) {
  return write_fails(fd) ? -1 : REAL(ssize_t, write, int, const void *, size_t)(fd, from, n);
}
ssize_t pwrite(int fd, const void *from, size_t n, off_t at) {
  return write_fails(fd) ? -1
                         : REAL(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, from, n, at);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t at) {
  return write_fails(fd)
             ? -1
             : REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, from, n, at);
}
