// SPDX-License-Identifier: Apache-2.0

// Package store keeps profile versions on disk: immutable, durable, safe for
// several processes at once.
//
//	s, err := store.Open("/var/lib/syslatch/profiles", store.Options{})
//	result, err := s.Add(ctx, recording, store.AddOptions{Activate: true})
//	version, err := s.Active("docker.io/library/nginx/web")
//
// # Layout
//
//	DIR/W/                          one per workload; its encoded name; flock(2)ed by writers
//	  workload                      the name as it was given
//	  active                        the injected version: its number, and its manifest's digest
//	  recordings/ID.sha256-HEX.json evidence; the name holds the content's digest
//	  versions/000001/profile.json  OCI seccomp JSON
//	  versions/000001/manifest.json where it came from
//	  versions/000001/sha256sums    of these two, as sha256sum -c takes it
//
// Only active is ever replaced. Names that begin with a dot are not the store's,
// but for those that begin with ".tmp-": what a writer prepares.
//
// # Durability
//
// [Store.Add] makes these calls, in this order. Behind the arrow is what a crash
// after any of the calls on the left leaves, be it of the process or of the
// machine. In no case is anything lost for which an earlier Add returned nil.
//
//	mkdir DIR/W; open it; flock      → an empty directory; the kernel drops the lock
//	mkdir W/versions, W/recordings   → empty directories
//	unlink W/.tmp-*, W/*/.tmp-*      → fewer leftovers
//	create, write, fsync W/.tmp-workload; fsync DIR; rename to workload; fsync W
//	                                 → a leftover, or a workload without versions
//	create, write, fsync recordings/.tmp-ID…; renameat2(NOREPLACE); fsync recordings
//	                                 → a leftover, or evidence that is in no version
//	                                   yet: adding the recording again merges it
//	mkdir versions/.tmp-N; create, write, fsync profile.json, manifest.json and
//	sha256sums in it; fsync it       → a leftover
//	renameat2(NOREPLACE) to N; fsync versions
//	                                 → the version, whole, or a leftover
//	create, write, fsync W/.tmp-active; rename to active; fsync W
//	                                 → the version, not active: adding the recording
//	                                   again activates it
//
// What a killed writer renamed may be visible and not durable yet. So an Add that
// relies on what it finds syncs the directory where it found it, as if it had
// written it itself. Leftovers are removed by the next writer, under the lock, or
// at once by the writer that fails (disk full) and lives on.
//
// # Reading
//
// Readers take no lock: they see what a rename put in place, whole. Every read
// checks the digests, and that the files are of the workload and the number that
// were asked for. What doesn't fit is a [CorruptError], which names the file;
// nothing older or else is served in its place.
//
// Every name is opened with openat2(2), RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS,
// relative to the store's directory: a link that was planted in the store is an
// error, wherever it points.
//
// # Locking
//
// A writer holds flock(2) on the workload's directory, so that there is no lock
// file that could be removed, replaced or unwritable. If the directory was moved
// away meanwhile, the writer starts over with the new one. It waits in the kernel,
// no polling; when its context ends first, the error wraps [ErrLocked], the
// context's error, and names the holder as /proc/locks has it. flock can't be
// interrupted, so such a waiter's thread stays until the lock is free, at most one
// for each workload and Store: others of this process queue before it.
package store
