// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Image is a docker archive on disk and the name that it has when imported.
type Image struct {
	Name    string
	Archive string
}

// Names of the images.
const (
	PauseImage   = "syslatch.test/pause:1"
	BusyboxImage = "syslatch.test/busybox:1"
)

// busybox is Debian's busybox-static.
const busybox = "/bin/busybox"

// Pause builds the image of pods' infrastructure containers: a busybox that
// sleeps until SIGTERM, which CRI-O gives minutes.
func Pause(dir string) (*Image, error) {
	return busyboxImage(dir, PauseImage, []string{"/bin/busybox", "sh", "-c", "trap exit TERM; busybox sleep 2147483647 & wait"}, nil)
}

// Busybox builds an image of busybox with all its applets, and with extra files
// (name in the image -> path here).
func Busybox(dir string, extra map[string]string) (*Image, error) {
	return busyboxImage(dir, BusyboxImage, []string{"/bin/sh"}, extra)
}

func busyboxImage(dir, name string, entrypoint []string, extra map[string]string) (*Image, error) {
	layer := filepath.Join(dir, strings.NewReplacer("/", "_", ":", "_").Replace(name)+".layer.tar")
	f, err := os.Create(layer)
	if err != nil {
		return nil, err
	}
	defer os.Remove(layer)
	defer f.Close()
	w := tar.NewWriter(f)
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp", "root"} {
		if err := w.WriteHeader(&tar.Header{Name: d + "/", Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	files := map[string]string{"bin/busybox": busybox}
	for to, from := range extra {
		files[to] = from
	}
	for to, from := range files {
		data, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: to, Mode: 0o755, Size: int64(len(data))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox-static: %w", err)
	}
	for _, a := range strings.Fields(string(applets)) {
		if a == "busybox" {
			continue
		}
		if err := w.WriteHeader(&tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox"}); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return FromLayer(dir, name, layer, entrypoint)
}

// FromLayer makes an image of one uncompressed layer.
func FromLayer(dir, name, layer string, entrypoint []string) (*Image, error) {
	f, err := os.Open(layer)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sum := sha256.New()
	size, err := io.Copy(sum, f)
	if err != nil {
		return nil, err
	}
	digest := hex.EncodeToString(sum.Sum(nil))
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "created": time.Unix(0, 0).UTC(),
		"config": map[string]any{"Entrypoint": entrypoint, "Env": []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, "WorkingDir": "/"},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest}},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal([]map[string]any{{
		"Config": "config.json", "RepoTags": []string{name}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, strings.NewReplacer("/", "_", ":", "_").Replace(name)+".tar")
	out, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	w := tar.NewWriter(out)
	for name, data := range map[string][]byte{"config.json": config, "manifest.json": manifest} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Name: "layer.tar", Mode: 0o644, Size: size}); err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	if _, err := io.Copy(w, f); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return &Image{name, path}, out.Close()
}
