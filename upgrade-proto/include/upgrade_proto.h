/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * From a file descriptor to the service socket of the object behind it.
 *
 * Every call returns a descriptor (or 0) on success and a negative errno value on failure.
 * runtime_dir: the directory that holds the registry; NULL means the usual ones.
 * All descriptors are close-on-exec.
 */
#ifndef UPGRADE_PROTO_H
#define UPGRADE_PROTO_H

#ifdef __cplusplus
extern "C" {
#endif

#define UPGRADE_ROUTE_KERNEL 1u   /* by the fd address */
#define UPGRADE_ROUTE_REGISTRY 2u /* by an entry in the registry */

struct upgrade_listener;
struct upgrade_block;

/*
 * Offers service `name` of the object behind fd. Returns a descriptor to poll for reading, which belongs
 * to the listener. *routes (may be NULL) gets the routes that are open, or-ed together. `disk` is NULL, or
 * { major, minor } of the disk when fd is not the object itself (a ublk character device).
 * -EADDRINUSE: another server offers it. fd may be closed afterwards.
 */
int upgrade_listen(int fd, const char *name, const char *runtime_dir, const unsigned int *disk,
                   struct upgrade_listener **listener, unsigned int *routes);

/* Takes one waiting connection, without blocking: a socket that the caller owns, or -EAGAIN. */
int upgrade_accept(const struct upgrade_listener *listener, unsigned int *route);

/* Ends the offer and removes its entry; accepted sockets live on. NULL is allowed. */
void upgrade_listener_free(struct upgrade_listener *listener);

/*
 * Connects to service `name` of the object behind fd: a socket that the caller owns. On -ECONNREFUSED,
 * -ENOENT, -ENOTDIR, -EPROTOTYPE, -EACCES and -EPERM there is no service for this caller: go on with fd.
 */
int upgrade_connect(int fd, const char *name, const char *runtime_dir, unsigned int *route);

/*
 * As upgrade_connect, for a block device: reopens it exclusively (-EBUSY: mounted or claimed), writes out
 * and drops its page cache, connects, and checks the peer. The socket and the claim belong to *block.
 * -ENOTBLK: fd is something else.
 */
int upgrade_block(int fd, const char *name, const char *runtime_dir, struct upgrade_block **block,
                  unsigned int *route);

/* Shuts the connection down, drops the page cache again, ends the claim. *block is gone in any case. */
int upgrade_block_release(struct upgrade_block *block);

#ifdef __cplusplus
}
#endif
#endif
