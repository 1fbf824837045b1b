// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"runtime/debug"
	"strings"
)

// BuildVersion is what a program says of its own build.
type BuildVersion struct {
	Version  string `json:"version"`            // module version or "devel"
	Revision string `json:"revision,omitempty"` // commit, with "+dirty" where the tree was changed
	Go       string `json:"go"`
}

func (v BuildVersion) String() string {
	parts := []string{v.Version}
	if v.Revision != "" {
		parts = append(parts, v.Revision)
	}
	return strings.Join(append(parts, v.Go), " ")
}

// Version reads the build's own description from the binary
// (runtime/debug.ReadBuildInfo), so that no build flag has to carry it.
func Version() BuildVersion {
	v := BuildVersion{Version: "devel"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	v.Go = info.GoVersion
	if info.Main.Version != "" && info.Main.Version != "(devel)" {
		v.Version = info.Main.Version
	}
	dirty := false
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Revision = s.Value
		case "vcs.modified":
			dirty = s.Value == "true"
		}
	}
	if v.Revision != "" && dirty {
		v.Revision += "+dirty"
	}
	return v
}
