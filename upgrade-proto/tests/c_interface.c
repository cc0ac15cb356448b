/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include <upgrade_proto.h>

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define EXPECT(condition)                                                        \
	do {                                                                     \
		if (!(condition)) {                                              \
			printf("line %d: %s does not hold\n", __LINE__, #condition); \
			return 1;                                                \
		}                                                                \
	} while (0)

int main(int argc, char **argv)
{
	struct upgrade_listener *listener = NULL, *rival = NULL;
	struct upgrade_block *block = NULL;
	unsigned int routes = 0, client_route = 0, server_route = 0;
	int ends[2], watch, client, server;
	const char *dir = argv[argc - 1];
	char heard[6] = "";

	EXPECT(argc == 2 && pipe(ends) == 0);
	EXPECT(!strcmp(upgrade_version(), UPGRADE_PROTO_VERSION));
	EXPECT(!strcmp(upgrade_error(), ""));
	EXPECT(upgrade_connect(ends[0], "svc", dir, NULL) == -ECONNREFUSED);
	EXPECT(!strcmp(upgrade_error(), "no server offers this service on this object"));
	EXPECT(upgrade_connect(-1, "svc", dir, NULL) == -EBADF);
	EXPECT(upgrade_connect(ends[0], "a/b", dir, NULL) == -EINVAL);
	EXPECT(strstr(upgrade_error(), "'a/b'"));
	EXPECT(upgrade_connect(ends[0], NULL, dir, NULL) == -EINVAL);

	watch = upgrade_listen(ends[1], "svc", dir, NULL, &listener, &routes);
	EXPECT(watch >= 0 && listener && (routes & UPGRADE_ROUTE_REGISTRY));
	EXPECT(upgrade_listen(ends[1], "svc", dir, NULL, &rival, NULL) == -EADDRINUSE && !rival);
	EXPECT(upgrade_listen(ends[1], "svc", dir, NULL, NULL, NULL) == -EINVAL);
	EXPECT(upgrade_accept(listener, NULL) == -EAGAIN);

	client = upgrade_connect(ends[0], "svc", dir, &client_route);
	EXPECT(client >= 0 && (client_route & routes));
	struct pollfd ready = { .fd = watch, .events = POLLIN };
	EXPECT(poll(&ready, 1, 5000) == 1);
	server = upgrade_accept(listener, &server_route);
	EXPECT(server >= 0 && server_route == client_route);
	EXPECT(write(client, "hello", 5) == 5 && read(server, heard, 5) == 5 && !strcmp(heard, "hello"));

	upgrade_listener_free(listener);
	upgrade_listener_free(NULL);
	EXPECT(upgrade_connect(ends[0], "svc", dir, NULL) == -ECONNREFUSED);
	EXPECT(upgrade_block(ends[0], "svc", dir, &block, NULL) == -ENOTBLK && !block);
	EXPECT(upgrade_block_release(NULL) == -EINVAL);
	printf("passed\n");
	return 0;
}
