// SPDX-License-Identifier: Apache-2.0

package hook

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/syslatch/syslatch/internal/policy"
)

// Annotations by which engines name themselves and what they know.
const (
	managerAnnotation = "io.container.manager" // podman: libpod
	crioPrefix        = "io.kubernetes.cri-o."
)

// isSandbox says whether a container only holds a pod's namespaces. As with NRI,
// such are nobody's workload. CRI-O marks them; podman (4.3.1) doesn't, whose
// infra containers are named POD-infra. There the mark would be the container's
// own word: anyone could be left alone by an annotation.
func isSandbox(annotations map[string]string) bool {
	return engineOf(annotations) == "cri-o" && annotations[crioPrefix+"ContainerType"] == "sandbox"
}

// podmanID finds the container's id in what podman calls its cgroup:
// "/libpod_parent/libpod-ID", "machine.slice:libpod:ID", "…/libpod-payload-ID".
var podmanID = regexp.MustCompile(`(?:^|[-:/])([0-9a-f]{64})$`)

// podmanFile finds the id in the path of a file that podman makes for the
// container: GRAPHROOT/overlay-containers/ID/userdata/shm.
var podmanFile = regexp.MustCompile(`^(/.*)/([0-9a-f]{64})/userdata/`)

// ownFiles are the mounts that are always of the container's own files: with
// `--network container:…` /etc/hosts is another's.
var ownFiles = []string{"/run/.containerenv", "/dev/shm"}

// engineOf says which engine made a container, as far as it tells.
func engineOf(annotations map[string]string) string {
	switch {
	case annotations[managerAnnotation] == "libpod":
		return "podman"
	case hasPrefix(annotations, crioPrefix):
		return "cri-o"
	}
	return ""
}

func hasPrefix(annotations map[string]string, prefix string) bool {
	for k := range annotations {
		// podman, whose conmon is CRI-O's, sets some too.
		if strings.HasPrefix(k, prefix) && k != crioPrefix+"Created" && k != crioPrefix+"TTY" {
			return true
		}
	}
	return false
}

// container takes from a spec what policies decide on. id is empty where the
// engine doesn't tell it, as podman before the container is created. An error
// means that podman's own account of the container can't be believed: without a
// name and an image, the policies that match by them would not.
func (d *document) container(id string) (policy.Container, error) {
	v := &d.view
	a := v.Annotations
	c := policy.Container{
		ID:          id,
		Annotations: a,
		CgroupsPath: v.Linux.CgroupsPath,
		Seccomp:     v.Linux.Seccomp,
	}
	if engineOf(a) == "cri-o" {
		c.Name = a["io.kubernetes.container.name"]
		c.Pod = a["io.kubernetes.pod.name"]
		c.Namespace = a["io.kubernetes.pod.namespace"]
		c.PodUID = a["io.kubernetes.pod.uid"]
		// Of an image without a name, the digests may be the pod's own annotation.
		if c.Image = a[crioPrefix+"ImageName"]; c.Image != "" {
			c.ImageDigest = policy.RepoDigest(c.Image, a[crioPrefix+"ImageRepoDigests"])
		}
		return c, nil
	}
	if c.ID == "" {
		c.ID = v.podmanID()
	}
	s, err := v.stored(c.ID)
	c.Name, c.Image, c.ImageDigest = s.name, s.image, s.digest
	return c, err
}

func (v *view) podmanID() string {
	if m := podmanID.FindStringSubmatch(v.Linux.CgroupsPath); m != nil {
		return m[1]
	}
	for _, mount := range v.Mounts {
		if !slices.Contains(ownFiles, mount.Destination) {
			continue
		}
		if m := podmanFile.FindStringSubmatch(mount.Source); m != nil {
			return m[2]
		}
	}
	return ""
}

// stored is what containers/storage keeps of a container.
type stored struct{ name, image, digest string }

// maxStored bounds the list of all containers, at about 500 bytes each, and that of
// all images.
const maxStored = 64 << 20

// stored looks a container up in podman's storage, whose list is beside the
// directories that the spec names: neither the container's name nor its image is
// in the spec. The file is believed only if root alone can write it, and what it
// says of the container only if that has the container's root: the id may be taken
// from a mount's source, which whoever starts the container chooses. What isn't in
// the list is empty: so is a container without an image (--rootfs).
func (v *view) stored(id string) (stored, error) {
	if id == "" {
		return stored{}, nil
	}
	var directories []string
	add := func(dir string) {
		if !slices.Contains(directories, dir) {
			directories = append(directories, dir)
		}
	}
	for _, mount := range v.Mounts {
		if m := podmanFile.FindStringSubmatch(mount.Source); m != nil && m[2] == id {
			add(m[1])
		}
	}
	// GRAPHROOT/overlay/LAYER/merged, GRAPHROOT/vfs/dir/LAYER.
	root := filepath.Clean("/" + v.Root.Path)
	for at := root; at != "/"; at = filepath.Dir(at) {
		add(at + "-containers")
	}
	for _, dir := range directories {
		// The second is that of containers that don't outlive a reboot (--rm).
		for _, name := range []string{"containers.json", "volatile-containers.json"} {
			c, err := lookUp[storedContainer](dir, name, id)
			if c != nil && !slices.Contains(strings.Split(root, "/"), c.Layer) {
				err = fmt.Errorf("container %s has the layer %.100q, and the spec's root is %.200q: it is another container's id", id, c.Layer, root)
			}
			if err != nil {
				return stored{}, fmt.Errorf("podman's list of containers %s: %w (the container's name and image stand there)", filepath.Join(dir, name), err)
			}
			if c == nil {
				continue
			}
			images, _ := strings.CutSuffix(dir, "-containers")
			image, err := lookUp[storedImage](images+"-images", "images.json", c.Image)
			if err != nil {
				return stored{}, fmt.Errorf("podman's list of images %s-images/images.json: %w (the image's digest stands there)", images, err)
			}
			s := c.stored()
			if image != nil {
				s.digest = image.Digest
			}
			return s, nil
		}
	}
	return stored{}, nil
}

// storedContainer and storedImage are entries of containers/storage's lists.
type (
	storedContainer struct {
		ID       string   `json:"id"`
		Names    []string `json:"names"`
		Image    string   `json:"image"` // its id
		Layer    string   `json:"layer"`
		Metadata string   `json:"metadata"`
	}
	storedImage struct {
		ID     string `json:"id"`
		Digest string `json:"digest"` // of its manifest
	}
)

func (c storedContainer) id() string { return c.ID }
func (i storedImage) id() string     { return i.ID }

func (c storedContainer) stored() stored {
	var metadata struct {
		ImageName string `json:"image-name"`
		Name      string `json:"name"`
	}
	// A container without an image (--rootfs) has none.
	_ = json.Unmarshal([]byte(c.Metadata), &metadata)
	s := stored{name: metadata.Name, image: metadata.ImageName}
	if s.name == "" && len(c.Names) > 0 {
		s.name = c.Names[0]
	}
	return s
}

// lookUp finds an entry of a list. It returns nil where there is no such file, or
// no such entry in it.
func lookUp[E interface{ id() string }](dir, name, id string) (*E, error) {
	data, err := readRootOnly(dir, name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []E
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, err
	}
	for _, e := range all {
		if e.id() == id {
			return &e, nil
		}
	}
	return nil, nil
}

var (
	errNotRoots = errors.New("others than root can write it, or its directory (chown root, chmod go-w)")
	errTooLong  = fmt.Errorf("more than %d bytes", maxStored)
)

// readRootOnly reads a file that root alone can write or replace.
func readRootOnly(dir, name string) ([]byte, error) {
	d, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(dir, name), Err: err}
	}
	f := os.NewFile(uintptr(fd), filepath.Join(dir, name))
	defer f.Close()
	for file, kind := range map[*os.File]uint32{d: unix.S_IFDIR, f: unix.S_IFREG} {
		var st unix.Stat_t
		if err := unix.Fstat(int(file.Fd()), &st); err != nil {
			return nil, err
		}
		if st.Uid != 0 || st.Mode&0o022 != 0 || st.Mode&unix.S_IFMT != kind {
			return nil, errNotRoots
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxStored+1))
	if err == nil && len(data) > maxStored {
		err = errTooLong
	}
	return data, err
}
