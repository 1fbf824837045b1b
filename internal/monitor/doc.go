// SPDX-License-Identifier: Apache-2.0

// Package monitor sees what is denied without anybody being asked: by seccomp filters
// alone, at native speed.
//
// The kernel tells its audit log of that, of filters that were loaded with
// SECCOMP_FILTER_FLAG_LOG. No auditd is needed to see it: a BPF program counts at the
// place where the kernel does so (fentry/audit_seccomp), and where the kernel takes no
// such program the records themselves are read, from audit's multicast group. Calls that
// are allowed cost the same with either as with none.
package monitor
