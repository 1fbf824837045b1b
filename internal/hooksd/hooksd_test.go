// SPDX-License-Identifier: Apache-2.0

package hooksd

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func write(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func options(t *testing.T, e Engine) Options {
	dir := t.TempDir()
	return Options{
		Engine: e, Dir: dir + "/hooks.d",
		Hook:   write(t, dir+"/syslatch-hook", "#!/bin/sh\n", 0o755),
		Config: write(t, dir+"/policy.yaml", "", 0o600),
	}
}

func TestInstall(t *testing.T) {
	for engine, want := range map[Engine][]string{
		Podman: {"createRuntime", "poststop", "precreate"},
		CRIO:   {"createRuntime", "poststop"}, // it exits on precreate
	} {
		o := options(t, engine)
		r, err := Install(o)
		if err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(o.Dir)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range entries {
			data, err := os.ReadFile(filepath.Join(o.Dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			var f hookFile
			if err := json.Unmarshal(data, &f); err != nil {
				t.Fatal(err)
			}
			got = append(got, f.Stages...)
			if args := []string{"syslatch-hook", f.Stages[0], "--config", o.Config}; f.Hook.Path != o.Hook || !slices.Equal(f.Hook.Args, args) || !f.When.Always {
				t.Errorf("%s: %s", e.Name(), data)
			}
		}
		if !slices.Equal(got, want) || len(r.Files) != len(want) {
			t.Errorf("%s: stages %v, files %v, want %v", engine, got, r.Files, want)
		}
		if wantLine := engine == Podman; (r.ConfLine != "") != wantLine {
			t.Errorf("%s: line %q", engine, r.ConfLine)
		}

		if r, err = Uninstall(o); err != nil || len(r.Files) != len(want) {
			t.Errorf("uninstall: %v, %v", r.Files, err)
		}
		if entries, _ := os.ReadDir(o.Dir); len(entries) != 0 {
			t.Errorf("left behind: %v", entries)
		}
		if r, err = Uninstall(o); err != nil || len(r.Files) != 0 {
			t.Errorf("uninstall again: %v, %v", r.Files, err)
		}
	}
}

func TestInstallRefuses(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"CRI-O reads":  func(o *Options) { o.Dir = SharedDir },
		"want podman":  func(o *Options) { o.Engine = "docker" },
		"no such file": func(o *Options) { o.Hook += "x" },
		"permission":   func(o *Options) { o.Hook = o.Config },
	} {
		o := options(t, Podman)
		change(&o)
		if _, err := Install(o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want an error with %q", err, name)
		}
		if _, err := os.Stat(o.Dir); err == nil && o.Dir != SharedDir {
			t.Errorf("%s: directory was made", name)
		}
	}
}

func TestLook(t *testing.T) {
	root := t.TempDir()
	o := options(t, Podman)
	look := func() Status {
		t.Helper()
		s, err := Look(o, root, "")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := look(); s.Works || s.Read || len(s.Problems) != 4 {
		t.Errorf("nothing there: %+v", s)
	}
	r, err := Install(o)
	if err != nil {
		t.Fatal(err)
	}
	if s := look(); s.Works || len(s.Files) != 3 || len(s.Problems) != 1 || !strings.Contains(s.Problems[0], r.ConfLine) {
		t.Errorf("installed, not read: %+v", s)
	}
	// The printed line is what containers.conf takes.
	write(t, root+r.ConfFile, r.ConfLine+"\n", 0o644)
	if s := look(); !s.Works || !s.Read {
		t.Errorf("installed and read: %+v", s)
	}
	write(t, root+"/etc/containers/containers.conf.d/z.conf", "[engine]\nhooks_dir = []\n", 0o644)
	if s := look(); s.Works {
		t.Errorf("a later file takes it back: %+v", s)
	}
	write(t, root+"/etc/containers/containers.conf.d/z.conf", "[engine]\nhooks_dir = [\"/x\", {append=true}]\n", 0o644)
	if s := look(); !s.Works {
		t.Errorf("a later file adds to it: %+v", s)
	}
	conf := write(t, root+"/own.conf", "[engine]\nhooks_dir = [\""+o.Dir+"\"]\n", 0o644)
	if s, err := Look(o, root, conf); err != nil || !s.Works {
		t.Errorf("CONTAINERS_CONF: %+v, %v", s, err)
	}
	for _, spoil := range []func(){
		func() { write(t, o.Dir+"/syslatch-precreate.json", "{", 0o644) },
		func() {
			path := o.Dir + "/syslatch-precreate.json"
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			write(t, path, strings.Replace(string(data), `"always": true`, `"always": true, "annotations": {"a": "b"}`, 1), 0o644)
		},
		func() { _ = os.Remove(o.Config) },
		func() { _ = os.Remove(o.Hook) },
		func() { write(t, conf, "[engine", 0o644) },
	} {
		if _, err := Install(o); err != nil {
			t.Fatal(err)
		}
		spoil()
		if s, err := Look(o, root, conf); err != nil || s.Works {
			t.Errorf("broken: %+v, %v", s, err)
		}
		write(t, o.Config, "", 0o600)
		write(t, o.Hook, "#!/bin/sh\n", 0o755)
	}
}
