/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * From a file descriptor to the service socket of the object behind it.
 *
 * Results: every call that returns int returns a descriptor (or 0) on success and a negative errno value
 * on failure; upgrade_error() has the reason as text. All descriptors are close-on-exec.
 *
 * runtime_dir: the directory that holds the registry; NULL means the usual ones.
 *
 * Threads: all functions may be called from any thread at any time, upgrade_accept() also from several
 * threads on one listener. Free or release an object once, when no other call uses it. After fork() the
 * child may use and free what it inherited; only the process that made a listener removes its entry.
 * No function installs signal handlers or changes process-wide state, none is async-signal-safe.
 *
 * Memory: an object belongs to the caller until it is freed or released by the function named for it.
 * Strings are read during the call only. A bug inside the library ends the process (abort).
 *
 * No service, for upgrade_connect() and upgrade_block(). The caller goes on using fd:
 *
 *   -ECONNREFUSED        no server offers the service on this object, or the object was exchanged for
 *                        another one while the connection was made
 *   -ENOENT              as above, and the registry cannot be asked: /proc is not mounted
 *   -EACCES              the kernel or the mode of the socket refuses this caller; or fd is open for
 *                        reading only and the disk can be written; or fd is open for writing only
 *   -EPERM               a rule of trust is broken: the registry, or the user of the server
 *   -EPROTOTYPE          the kernel: the service is not of stream sockets
 *
 * Errors of all calls:
 *
 *   -EINVAL              a NULL pointer or a malformed name (1 to 64 printable ASCII characters, no '/')
 *   -EBADF               fd is not open, or O_PATH
 *   -EAGAIN              the server's backlog stayed full for five seconds (upgrade_accept: no client)
 *   -EMFILE, -ENFILE, -ENOMEM, -EIO and others, as the system call said that failed
 */
#ifndef UPGRADE_PROTO_H
#define UPGRADE_PROTO_H

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header; programs linked with another major number do not run together. */
#define UPGRADE_PROTO_VERSION "0.1.0"

#define UPGRADE_ROUTE_KERNEL 1u   /* by the fd address */
#define UPGRADE_ROUTE_REGISTRY 2u /* by an entry in the registry */

struct upgrade_listener;
struct upgrade_block;

/* The version of the library that is loaded. */
const char *upgrade_version(void);

/*
 * Why the last call of this thread that failed did so: one line for people, never NULL, "" before the first
 * failure. Valid until the next failure in this thread. Programs decide by the errno value.
 */
const char *upgrade_error(void);

/*
 * Offers service `name` of the object behind fd. Returns a descriptor to poll for reading, which belongs
 * to the listener. *routes (may be NULL) gets the routes that are open, or-ed together. `disk` is NULL, or
 * { major, minor } of the disk when fd is not the object itself (a ublk character device).
 * fd may be closed afterwards.
 *
 *   -EADDRINUSE          another server offers it
 *   -EOPNOTSUPP          fd is of a kind that can carry no service
 *   -EPERM               the registry breaks a rule of trust, or the kernel refuses
 *   -ENOENT              /proc is not mounted, and the kernel has no fd addresses
 *   -EAGAIN              another process held the registry's lock for two seconds
 */
int upgrade_listen(int fd, const char *name, const char *runtime_dir, const unsigned int *disk,
                   struct upgrade_listener **listener, unsigned int *routes);

/* Takes one waiting connection, without blocking: a socket that the caller owns, or -EAGAIN. */
int upgrade_accept(const struct upgrade_listener *listener, unsigned int *route);

/* Ends the offer and removes its entry; accepted sockets live on. NULL is allowed. */
void upgrade_listener_free(struct upgrade_listener *listener);

/*
 * Connects to service `name` of the object behind fd: a socket that the caller owns. For pipes. Disks need
 * upgrade_block: without the claim and the write-out that it makes, two programs write to one disk.
 */
int upgrade_connect(int fd, const char *name, const char *runtime_dir, unsigned int *route);

/*
 * Upgrades the block device behind fd, which stays the caller's: reopens it exclusively, writes out and drops
 * its page cache, and connects. The socket that is returned and the claim belong to *block.
 *
 *   -ENOTBLK             fd is something else
 *   -EBUSY               the disk is mounted, or claimed by another program
 */
int upgrade_block(int fd, const char *name, const char *runtime_dir, struct upgrade_block **block,
                  unsigned int *route);

/* Shuts the connection down, drops the page cache again, ends the claim. *block is gone in any case. */
int upgrade_block_release(struct upgrade_block *block);

#ifdef __cplusplus
}
#endif
#endif
