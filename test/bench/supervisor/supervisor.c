// SPDX-License-Identifier: Apache-2.0

/* Command supervisor answers "go on" to all that the seccomp listener on descriptor
 * 3 asks: as little as a supervisor can do, for comparison.
 */
#include <errno.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>

#ifndef SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP /* Linux 6.6 */
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#endif

int main(void)
{
	const int fd = 3;

	if (ioctl(fd, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP) && errno != EINVAL && errno != ENOTTY) {
		perror("SECCOMP_IOCTL_NOTIF_SET_FLAGS");
		return 1;
	}
	for (;;) {
		struct seccomp_notif n;

		memset(&n, 0, sizeof(n));
		if (ioctl(fd, SECCOMP_IOCTL_NOTIF_RECV, &n)) {
			if (errno == EINTR || errno == ENOENT)
				continue;
			perror("SECCOMP_IOCTL_NOTIF_RECV");
			return 1;
		}
		struct seccomp_notif_resp r = { .id = n.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };
		if (ioctl(fd, SECCOMP_IOCTL_NOTIF_SEND, &r) && errno != ENOENT) {
			perror("SECCOMP_IOCTL_NOTIF_SEND");
			return 1;
		}
	}
}
