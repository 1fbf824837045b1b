// SPDX-License-Identifier: Apache-2.0

// Package hooksd puts syslatch-hook where engines look for OCI hooks (oci-hooks(5)),
// takes it away again, and tells whether an engine would find it.
//
// An engine reads all JSON files of its directories. podman knows the stage
// precreate; CRI-O exits on it ("unknown stage"), and reads podman's default
// directory too. So podman's files go to a directory of their own, which
// containers.conf has to name.
package hooksd

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Engine is whose hooks they are.
type Engine string

// The engines.
const (
	Podman Engine = "podman"
	CRIO   Engine = "crio"
)

// Directories by default.
const (
	PodmanDir = "/etc/syslatch/hooks.d"
	SharedDir = "/usr/share/containers/oci/hooks.d" // read by podman and CRI-O without being told
	AdminDir  = "/etc/containers/oci/hooks.d"       // read by newer podman, and by CRI-O if its hooks_dir has it
)

// stages of each engine; see package hook.
var stages = map[Engine][]string{
	Podman: {"precreate", "createRuntime", "poststop"},
	CRIO:   {"createRuntime", "poststop"},
}

// timeout of a stage in seconds, after which the engine kills the hook; the hook
// gives up by itself before.
const timeout = 60

// Options say what to install.
type Options struct {
	Engine Engine
	Dir    string // empty: the engine's default
	Hook   string // path of syslatch-hook
	Config string // path of the policy file
	Socket string // syslatchd's for rootless podman; empty: the hook's default
}

func (o *Options) complete() error {
	if stages[o.Engine] == nil {
		return fmt.Errorf("engine %q: want podman or crio", o.Engine)
	}
	if o.Dir == "" {
		o.Dir = map[Engine]string{Podman: PodmanDir, CRIO: SharedDir}[o.Engine]
	}
	for _, p := range []*string{&o.Dir, &o.Hook, &o.Config} {
		var err error
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if o.Engine == Podman && (o.Dir == SharedDir || o.Dir == AdminDir) {
		return fmt.Errorf("%s: CRI-O reads this directory too, and exits on a precreate hook: give podman one of its own, such as %s", o.Dir, PodmanDir)
	}
	return nil
}

// hookFile is one file of hooks.d, version 1.0.0.
type hookFile struct {
	Version string   `json:"version"`
	Hook    command  `json:"hook"`
	When    when     `json:"when"`
	Stages  []string `json:"stages"`
}

type command struct {
	Path    string   `json:"path"`
	Args    []string `json:"args"`
	Timeout int      `json:"timeout"`
}

// always: the policy file decides, not the engine.
var always = when{Always: true}

// when is what oci-hooks(5) has.
type when struct {
	Always        bool              `json:"always,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`
	Commands      []string          `json:"commands,omitempty"`
	HasBindMounts bool              `json:"hasBindMounts,omitempty"`
}

func fileName(stage string) string { return "syslatch-" + stage + ".json" }

// Result is what was done, or found.
type Result struct {
	Engine Engine   `json:"engine"`
	Dir    string   `json:"dir"`
	Files  []string `json:"files"`
	// ConfFile and ConfLine are what makes podman read Dir; empty where it does
	// by itself.
	ConfFile string `json:"confFile,omitempty"`
	ConfLine string `json:"confLine,omitempty"`
}

func (o *Options) result() Result {
	r := Result{Engine: o.Engine, Dir: o.Dir, Files: []string{}}
	if o.Engine == Podman {
		r.ConfFile = "/etc/containers/containers.conf.d/syslatch.conf"
		r.ConfLine = fmt.Sprintf("engine.hooks_dir = [%q, %q]", SharedDir, o.Dir)
	}
	return r
}

// Install writes the files. They are written one by one, each whole: an engine
// that starts a container meanwhile may run some of the stages, which syslatch-hook
// bears.
func Install(o Options) (Result, error) {
	if err := o.complete(); err != nil {
		return Result{}, err
	}
	if err := executable(o.Hook); err != nil {
		return Result{}, err
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return Result{}, err
	}
	r := o.result()
	// The end first: a container that begins to be recorded has one.
	list := slices.Clone(stages[o.Engine])
	slices.Reverse(list)
	for _, stage := range list {
		data, err := json.MarshalIndent(hookFile{
			Version: "1.0.0",
			Hook:    command{Path: o.Hook, Args: o.args(stage), Timeout: timeout},
			When:    always,
			Stages:  []string{stage},
		}, "", "  ")
		if err != nil {
			return r, err
		}
		path := filepath.Join(o.Dir, fileName(stage))
		if err := replace(path, append(data, '\n')); err != nil {
			return r, err
		}
		r.Files = append(r.Files, path)
	}
	slices.Sort(r.Files)
	return r, nil
}

func (o *Options) args(stage string) []string {
	args := []string{filepath.Base(o.Hook), stage, "--config", o.Config}
	if o.Socket != "" {
		args = append(args, "--rootless-socket", o.Socket)
	}
	return args
}

func executable(path string) error {
	st, err := os.Stat(path)
	if err == nil && (!st.Mode().IsRegular() || st.Mode()&0o111 == 0) {
		err = &fs.PathError{Op: "execute", Path: path, Err: fs.ErrPermission}
	}
	if err != nil {
		return fmt.Errorf("syslatch-hook: %w (say where it is with --hook)", err)
	}
	return nil
}

func replace(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".syslatch-*") // engines read *.json
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // there is only one error to tell
	}
	return err
}

// Uninstall removes what Install wrote. It is no error if nothing is there.
func Uninstall(o Options) (Result, error) {
	if err := o.complete(); err != nil {
		return Result{}, err
	}
	r := o.result()
	// The beginning first.
	for _, stage := range stages[o.Engine] {
		path := filepath.Join(o.Dir, fileName(stage))
		if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return r, err
		}
		r.Files = append(r.Files, path)
	}
	slices.Sort(r.Files)
	return r, nil
}

// Status is what there is.
type Status struct {
	Result
	// Read says that the engine reads Dir, as far as its configuration tells.
	Read bool `json:"read"`
	// Works: it reads it, and finds all that it needs there.
	Works    bool     `json:"works"`
	Problems []string `json:"problems"`
}

// Look examines an installation. root is the host's root directory, "/" but for
// tests; conf overrides podman's configuration files (CONTAINERS_CONF).
func Look(o Options, root, conf string) (Status, error) {
	if err := o.complete(); err != nil {
		return Status{}, err
	}
	s := Status{Result: o.result(), Problems: []string{}}
	problem := func(format string, args ...any) { s.Problems = append(s.Problems, fmt.Sprintf(format, args...)) }
	for _, stage := range stages[o.Engine] {
		path := filepath.Join(o.Dir, fileName(stage))
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			problem("%s is missing ('syslatch hook install' writes it)", path)
			continue
		}
		var f hookFile
		if err == nil {
			err = json.Unmarshal(data, &f)
		}
		if err == nil && (f.Version != "1.0.0" || !reflect.DeepEqual(f.When, always) || !slices.Equal(f.Stages, []string{stage}) || len(f.Hook.Args) < 2 || f.Hook.Args[1] != stage) {
			err = errors.New("is not what 'syslatch hook install' writes")
		}
		if err == nil {
			err = executable(f.Hook.Path)
		}
		if err != nil {
			problem("%s: %v", path, err)
			continue
		}
		s.Files = append(s.Files, path)
		if i := slices.Index(f.Hook.Args, "--config"); i > 0 && i+1 < len(f.Hook.Args) {
			if _, err := os.Stat(f.Hook.Args[i+1]); err != nil {
				problem("%s: policy file: %v (no container starts without it)", path, err)
			}
		}
	}
	slices.Sort(s.Files)
	dirs, err := readDirs(o.Engine, root, conf)
	if err != nil {
		problem("%v", err)
	}
	s.Read = slices.Contains(dirs, o.Dir)
	switch {
	case s.Read:
	case o.Engine == Podman:
		problem("podman reads %s, not %s: put the line\n  %s\ninto %s", strings.Join(dirs, " and "), o.Dir, s.ConfLine, s.ConfFile)
	default:
		problem("CRI-O reads %s unless its hooks_dir says otherwise, not %s", strings.Join(dirs, " and "), o.Dir)
	}
	s.Works = len(s.Problems) == 0
	return s, nil
}

// readDirs lists the directories that an engine reads. Of podman's configuration
// files (containers.conf(5)) a later one's list replaces an earlier one's. After
// {append=true} in one (podman 5), it and later ones are added, until
// {append=false}.
func readDirs(e Engine, root, conf string) ([]string, error) {
	if e == CRIO {
		return []string{SharedDir}, nil
	}
	dirs := []string{SharedDir}
	files := []string{"usr/share/containers/containers.conf", "etc/containers/containers.conf"}
	more, err := filepath.Glob(filepath.Join(root, "etc/containers/containers.conf.d/*.conf"))
	if err != nil {
		return dirs, err
	}
	for i := range files {
		files[i] = filepath.Join(root, files[i])
	}
	files = append(files, more...) // Glob sorts
	if conf != "" {
		files = []string{conf}
	}
	added := false
	for _, path := range files {
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && conf == "" {
			continue
		}
		if err != nil {
			return dirs, err
		}
		var c struct {
			Engine struct {
				HooksDir []any `toml:"hooks_dir"`
			} `toml:"engine"`
		}
		if err := toml.Unmarshal(data, &c); err != nil {
			return dirs, fmt.Errorf("%s: %w", path, err)
		}
		if c.Engine.HooksDir == nil {
			continue
		}
		var list []string
		for _, v := range c.Engine.HooksDir {
			switch v := v.(type) {
			case string:
				list = append(list, v)
			case map[string]any:
				if a, ok := v["append"].(bool); ok {
					added = a
				}
			}
		}
		if added {
			list = slices.Concat(dirs, list)
		}
		dirs = list
	}
	return dirs, nil
}
