// SPDX-License-Identifier: Apache-2.0

// Package cgroup maps between processes, cgroup directories and cgroup ids, on
// hosts with cgroup v2, with v1 controllers beside a v2 tree (hybrid), and with
// v1 alone.
//
// A v1-only host has no cgroup ids: [Detect] succeeds there, and what needs an
// id returns [ErrNoV2]. Errors about processes that have ended wrap [ErrGone],
// those about cgroups that are gone fs.ErrNotExist; all others are the kernel's,
// with what was attempted.
//
//	h, err := cgroup.Detect()
//	path, err := h.OfPID(pid)
//	id, err := cgroup.ID(path)
//
// Paths are those that this process sees. In a cgroup namespace they differ
// from the host's; ids don't.
package cgroup

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoV2 means that the host mounts no cgroup v2 hierarchy.
var ErrNoV2 = errors.New("no cgroup v2 hierarchy is mounted: cgroup ids, and so recording, need one (boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified)")

// Mode is how a host's cgroups are set up.
type Mode int

const (
	V1     Mode = iota + 1 // v1 hierarchies only
	Hybrid                 // controllers on v1, a v2 tree beside them
	V2                     // one v2 hierarchy with all controllers that limits need
)

// String is "v1", "hybrid" or "v2".
func (m Mode) String() string {
	switch m {
	case V1:
		return "v1"
	case Hybrid:
		return "hybrid"
	case V2:
		return "v2"
	}
	return fmt.Sprintf("Mode(%d)", int(m))
}

// Hierarchy is where the host's cgroup hierarchies are mounted.
type Hierarchy struct {
	Mode    Mode
	Unified string // mount point of v2; "" with V1

	root string           // what of the v2 hierarchy is mounted at Unified
	v1   map[string]mount // by controller; name=X as X
}

type mount struct {
	point string
	root  string // what of the hierarchy is mounted there, as our cgroup namespace sees it
}

// Detect reads /proc/self/mountinfo. A mount that another one covers doesn't
// count.
func Detect() (*Hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMountinfo(f, func(point string, dev uint64) bool {
		var st unix.Stat_t
		return unix.Stat(point, &st) == nil && st.Dev == dev
	})
}

// RequireV2 returns ErrNoV2 on a v1-only host.
func (h *Hierarchy) RequireV2() error {
	if h.Unified == "" {
		return ErrNoV2
	}
	return nil
}

// V1Controllers lists the controllers and names that v1 hierarchies are
// mounted with, sorted.
func (h *Hierarchy) V1Controllers() []string { return slices.Sorted(maps.Keys(h.v1)) }

// v1Controllers are all that v1 has; no more are added to it. Other options of
// a mount, such as SELinux's seclabel, stand on the same list.
var v1Controllers = []string{
	"blkio", "cpu", "cpuacct", "cpuset", "debug", "devices", "dmem", "freezer", "hugetlb",
	"memory", "misc", "net_cls", "net_prio", "perf_event", "pids", "rdma",
}

// parseMountinfo finds the cgroup mounts (proc_pid_mountinfo(5)). Of several
// mounts of one hierarchy the one that shows most of it counts: a pod with the
// host's tree mounted beside its own must see the host's.
func parseMountinfo(r io.Reader, visible func(point string, dev uint64) bool) (*Hierarchy, error) {
	h := &Hierarchy{v1: map[string]mount{}}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, filesystem := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(filesystem) < 3 || !strings.HasPrefix(filesystem[0], "cgroup") {
			continue
		}
		var major, minor uint32
		if _, err := fmt.Sscanf(fields[2], "%d:%d", &major, &minor); err != nil {
			continue
		}
		m := mount{point: unescape(fields[4]), root: unescape(fields[3])}
		if visible != nil && !visible(m.point, unix.Mkdev(major, minor)) {
			continue
		}
		switch filesystem[0] {
		case "cgroup2":
			if h.Unified == "" || wider(m.root, h.root) {
				h.Unified, h.root = m.point, m.root
			}
		case "cgroup":
			for o := range strings.SplitSeq(filesystem[2], ",") {
				name, named := strings.CutPrefix(o, "name=")
				if !named && !slices.Contains(v1Controllers, name) {
					continue
				}
				if old, ok := h.v1[name]; !ok || wider(m.root, old.root) {
					h.v1[name] = m
				}
			}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("mountinfo: %w", err)
	}
	switch {
	case h.Unified == "" && len(h.v1) == 0:
		return nil, errors.New("no cgroup hierarchy is mounted (mount -t cgroup2 none /sys/fs/cgroup)")
	case h.Unified == "":
		h.Mode = V1
	// Not any controller: net_cls alone on v1 is how some hosts mark traffic.
	case slices.ContainsFunc([]string{"memory", "cpu", "pids"}, func(c string) bool { return h.v1[c].point != "" }):
		h.Mode = Hybrid
	default:
		h.Mode = V2
	}
	return h, nil
}

// unescape undoes the octal escapes of mountinfo for space, tab, newline and
// backslash.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// split cuts a path of a hierarchy, as the kernel shows it to a cgroup
// namespace, into the steps up from that namespace's root and the names below.
func split(path string) (up int, names []string) {
	for name := range strings.SplitSeq(path, "/") {
		switch {
		case name == "":
		case name == ".." && len(names) == 0:
			up++
		default:
			names = append(names, name)
		}
	}
	return up, names
}

// wider says whether a mount of root shows more of a hierarchy than one of
// other.
func wider(root, other string) bool {
	up, names := split(root)
	otherUp, otherNames := split(other)
	return up > otherUp || up == otherUp && len(names) < len(otherNames)
}

// OfPID is the absolute path of a process's directory in the v2 hierarchy.
func (h *Hierarchy) OfPID(pid int) (string, error) { return h.Dir(pid, "") }

// Dir is the absolute path of a process's directory in the hierarchy of a v1
// controller, or with "" in the v2 hierarchy. A hierarchy without controllers
// goes by its name ("systemd").
func (h *Hierarchy) Dir(pid int, controller string) (string, error) {
	p, err := OpenProcess(pid)
	if err != nil {
		return "", err
	}
	defer p.Close()
	return h.DirOf(p, controller)
}

// DirOf is Dir for a process that is held open.
func (h *Hierarchy) DirOf(p *Process, controller string) (string, error) {
	m := mount{h.Unified, h.root}
	if controller != "" {
		if m = h.v1[controller]; m.point == "" {
			return "", fmt.Errorf("cgroup v1 controller %s is not mounted", controller)
		}
	} else if m.point == "" {
		return "", ErrNoV2
	}
	list, err := p.ReadFile("cgroup")
	if err != nil {
		return "", err
	}
	path, err := parseProcCgroup(list, controller)
	if err != nil {
		return "", fmt.Errorf("cgroup of pid %d: %w", p.pid, err)
	}
	dir, err := below(m, path)
	if errors.Is(err, errInside) {
		dir, err = search(m.point, p.pid)
	}
	if err != nil {
		return "", fmt.Errorf("cgroup of pid %d: %w", p.pid, err)
	}
	if strings.HasSuffix(dir, " (deleted)") {
		// The kernel's mark, unless somebody named a directory like that.
		if _, err := os.Lstat(dir); err != nil {
			return "", fmt.Errorf("cgroup of pid %d was removed: %w", p.pid, err)
		}
	}
	return dir, nil
}

// V1Dirs is where a process is in each v1 hierarchy, by controller or name.
func (h *Hierarchy) V1Dirs(pid int) (map[string]string, error) {
	p, err := OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	dirs := map[string]string{}
	for c := range h.v1 {
		if dirs[c], err = h.DirOf(p, c); err != nil {
			return nil, err
		}
	}
	return dirs, nil
}

// parseProcCgroup finds a controller's line in /proc/PID/cgroup, "ID:LIST:PATH",
// or with "" the v2 line "0::PATH" (cgroups(7)). A path holds no newline: the
// kernel refuses such a name.
func parseProcCgroup(list, controller string) (string, error) {
	for line := range strings.Lines(list) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			continue
		}
		if controller == "" {
			if parts[0] == "0" && parts[1] == "" {
				return parts[2], nil
			}
			continue
		}
		for c := range strings.SplitSeq(parts[1], ",") {
			if strings.TrimPrefix(c, "name=") == controller {
				return parts[2], nil
			}
		}
	}
	if controller == "" {
		return "", ErrNoV2
	}
	return "", fmt.Errorf("controller %s is not listed", controller)
}

// errInside: the mount begins above our cgroup namespace's root, and the path
// is in the namespace, so the names between are not to be had from the text.
var errInside = errors.New("cgroup is inside of this process's cgroup namespace, the mount outside")

// below puts a path of a hierarchy under its mount. Both are relative to the
// root of our cgroup namespace (kernel/cgroup/cgroup.c, cgroup_show_path and
// proc_cgroup_show).
func below(m mount, path string) (string, error) {
	rootUp, root := split(m.root)
	up, names := split(path)
	switch {
	case slices.Contains(names, ".."): // only the kernel's own stand at the beginning
		return "", fmt.Errorf("%s is no path of a cgroup", path)
	case up > rootUp:
		return "", fmt.Errorf("%s is outside of this process's cgroup namespace: run in the host's, or mount the host's %s", path, m.point)
	case up < rootUp && len(root) == 0:
		return "", errInside
	case up < rootUp || len(names) < len(root) || !slices.Equal(names[:len(root)], root):
		return "", fmt.Errorf("%s is not below %s, which is all that is mounted at %s", path, m.root, m.point)
	}
	return filepath.Join(m.point, filepath.Join(names[len(root):]...)), nil
}

// search finds a process by the lists of members.
func search(point string, pid int) (string, error) {
	want := strconv.Itoa(pid)
	var found string
	err := walk(point, func(dir string) error {
		// In a threaded cgroup the list can't be read; its threads are listed
		// with its domain.
		list, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err == nil && slices.Contains(strings.Split(string(list), "\n"), want) {
			found = dir
			return fs.SkipAll
		}
		return nil
	})
	if err == nil && found == "" {
		err = fmt.Errorf("in no cgroup below %s: %w", point, fs.ErrNotExist)
	}
	return found, err
}

// walk calls visit for root and the directories below it, parents before
// children. One that is removed meanwhile is passed over.
func walk(root string, visit func(dir string) error) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil && path != root && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)):
			return nil
		case err != nil:
			return err
		case !d.IsDir():
			return nil
		}
		return visit(path)
	})
}

// fileidKernfs is the type of a kernfs file handle, 8 bytes that are the node's
// id (FILEID_KERNFS of include/linux/exportfs.h).
const fileidKernfs = 0xfe

// ID is the cgroup id of a v2 directory: what bpf_get_current_cgroup_id returns
// to the tasks in it.
//
// It is read from the directory's file handle. The inode number is the same on
// 64-bit kernels from 5.5 on; before, and on 32-bit kernels, it is the id's
// lower half only, without the generation that tells a directory from an
// earlier one (fs/kernfs: kernfs_ino, kernfs_gen). It is taken where a seccomp
// filter denies name_to_handle_at.
func ID(path string) (uint64, error) {
	var fsStat unix.Statfs_t
	if err := unix.Statfs(path, &fsStat); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	if fsStat.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%s is not in a cgroup v2 hierarchy", path)
	}
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, path, 0)
	if err == nil && handle.Type() == fileidKernfs && handle.Size() == 8 {
		return binary.NativeEndian.Uint64(handle.Bytes()), nil
	}
	if err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EOPNOTSUPP) {
		return 0, &fs.PathError{Op: "name_to_handle_at", Path: path, Err: err}
	}
	return inode(path)
}

func inode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Ino, nil
}

// Path finds the directory with a cgroup id: through its file handle, which
// takes CAP_DAC_READ_SEARCH, or else by walking the v2 hierarchy. The error
// wraps fs.ErrNotExist where there is none, or none below the mount.
func (h *Hierarchy) Path(id uint64) (string, error) {
	if err := h.RequireV2(); err != nil {
		return "", err
	}
	path, err := h.pathByHandle(id)
	switch {
	case err == nil:
		return path, nil
	case errors.Is(err, unix.ESTALE): // no such node
		return "", fmt.Errorf("cgroup id %d: %w", id, fs.ErrNotExist)
	}
	return h.pathByWalk(id)
}

func (h *Hierarchy) pathByHandle(id uint64) (string, error) {
	// O_PATH would be refused as open_by_handle_at's mount.
	at, err := unix.Open(h.Unified, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(at)
	handle := unix.NewFileHandle(fileidKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(at, handle, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	// A directory outside of what is mounted has no path here; the walk says so.
	if got, err := ID(path); err != nil || got != id {
		return "", fmt.Errorf("%s is not cgroup %d", path, id)
	}
	return path, nil
}

func (h *Hierarchy) pathByWalk(id uint64) (string, error) {
	var found string
	err := walk(h.Unified, func(dir string) error {
		if got, err := ID(dir); err == nil && got == id {
			found = dir
			return fs.SkipAll
		}
		return nil
	})
	if err == nil && found == "" {
		err = fmt.Errorf("cgroup id %d: %w", id, fs.ErrNotExist)
	}
	return found, err
}

// Above is the first cgroup that is wanted, by its id, of that which a process is in and
// those above it; 0 if none is.
func (h *Hierarchy) Above(pid int, wanted func(id uint64) bool) (uint64, error) {
	dir, err := h.OfPID(pid)
	for ; err == nil && strings.HasPrefix(dir, h.Unified); dir = filepath.Dir(dir) {
		var id uint64
		if id, err = ID(dir); err == nil && wanted(id) {
			return id, nil
		}
	}
	return 0, err
}

// Children lists the directories below path, at any depth, parents before
// children.
func Children(path string) ([]string, error) {
	var out []string
	err := walk(path, func(dir string) error {
		if dir != path {
			out = append(out, dir)
		}
		return nil
	})
	return out, err
}

// ReadController reads a file that a controller keeps for a process's cgroup:
// v1file in the controller's hierarchy if v1 has that controller, else v2file in
// the v2 hierarchy. It returns the content without the space around it, and the
// file's path. The error wraps fs.ErrNotExist if there is no such file, because
// the cgroup is gone or the controller isn't enabled for it (or at v2's root).
//
//	value, path, err := h.ReadController(pid, "memory", "memory.max", "memory.limit_in_bytes")
func (h *Hierarchy) ReadController(pid int, controller, v2file, v1file string) (value, path string, err error) {
	file := v1file
	if h.v1[controller].point == "" {
		controller, file = "", v2file
	}
	dir, err := h.Dir(pid, controller)
	if err != nil {
		return "", "", err
	}
	path = filepath.Join(dir, file)
	data, err := os.ReadFile(path)
	if errors.Is(err, unix.ENODEV) { // removed between open and read
		err = &fs.PathError{Op: "read", Path: path, Err: fs.ErrNotExist}
	}
	return strings.TrimSpace(string(data)), path, err
}
