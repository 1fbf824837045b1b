// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/syslatch/syslatch/internal/cgroup"
)

// runtimeFeatures is the part of what `runc features` prints that matters here
// (runtime-spec, features.md).
type runtimeFeatures struct {
	Linux struct {
		Seccomp *struct {
			Enabled        *bool    `json:"enabled"`
			Actions        []string `json:"actions"`
			KnownFlags     []string `json:"knownFlags"`
			SupportedFlags []string `json:"supportedFlags"`
		} `json:"seccomp"`
	} `json:"linux"`
}

// checkRuntime asks an OCI runtime for its version and for what it makes of
// seccomp profiles.
func checkRuntime(name string) func(context.Context, *Host, Options) []Check {
	return func(ctx context.Context, h *Host, _ Options) []Check {
		c := Check{Name: "runtime." + name, Status: OK, Uses: "loads the filters into containers"}
		path, version, missing := h.program(ctx, name, "apt-get install "+name)
		if missing != nil {
			missing.Name = c.Name
			return []Check{*missing}
		}
		c.Found = fmt.Sprintf("%s at %s", version, path)
		if hierarchy, err := h.Cgroup(); name == "crun" && err == nil && hierarchy.Mode == cgroup.Hybrid {
			// Seen with 1.8.1: "cgroups in hybrid mode not supported".
			c.Status, c.Found, c.Remedy = Missing, c.Found+"; refuses hybrid cgroups", toV2+", or use runc"
			return []Check{c}
		}
		text, err := h.Run(ctx, path, "features")
		var f runtimeFeatures
		if err == nil {
			err = json.Unmarshal([]byte(text), &f)
		}
		newer := map[string]string{"runc": "install runc 1.2 or later", "crun": "install crun 1.9 or later"}[name]
		if err != nil {
			c.Status, c.Found = Warn, c.Found+"; doesn't tell its features: "+oneLine(err.Error())
			c.Remedy = newer
			return []Check{c}
		}
		s := f.Linux.Seccomp
		if s == nil || s.Enabled == nil || !*s.Enabled {
			c.Status, c.Found = Missing, c.Found+"; built without seccomp"
			c.Remedy = "install " + name + " built with seccomp (the distribution's is)"
			return []Check{c}
		}
		listener := "no listenerPath"
		if slices.Contains(s.Actions, "SCMP_ACT_NOTIFY") {
			listener = "listenerPath"
		}
		c.Found += "; " + listener + "; flags " + flagList(s.KnownFlags, s.SupportedFlags)
		switch {
		case listener == "no listenerPath":
			c.Status, c.Remedy = Warn, newer+" with libseccomp 2.5 or later: phases need SCMP_ACT_NOTIFY"
		case !slices.Contains(s.SupportedFlags, "SECCOMP_FILTER_FLAG_LOG"):
			c.Status, c.Remedy = Warn, newer+": denied calls are logged only with SECCOMP_FILTER_FLAG_LOG"
		}
		return []Check{c}
	}
}

// flagList names the flags that a runtime supports, and in parentheses those
// that it only knows: the libseccomp that it is linked with lacks those.
func flagList(known, supported []string) string {
	var words []string
	for _, f := range supported {
		words = append(words, strings.TrimPrefix(f, "SECCOMP_FILTER_FLAG_"))
	}
	for _, f := range known {
		if !slices.Contains(supported, f) {
			words = append(words, "("+strings.TrimPrefix(f, "SECCOMP_FILTER_FLAG_")+")")
		}
	}
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, " ")
}

// program finds a program and asks it for its version; else it says what to do.
func (h *Host) program(ctx context.Context, name, install string) (path, version string, missing *Check) {
	path, err := h.Find(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", &Check{Status: Missing, Found: "not installed", Remedy: install}
	}
	if err != nil {
		return "", "", &Check{Status: Error, Found: oneLine(err.Error()), Remedy: install}
	}
	text, err := h.Run(ctx, path, "--version")
	if err != nil {
		return "", "", &Check{Status: Error, Found: path + " --version: " + oneLine(err.Error()), Remedy: "reinstall " + name}
	}
	return path, versionOf(text), nil
}

// versionOf takes the version from "runc version 1.1.5+ds1", "podman version
// 4.3.1" or "containerd github.com/containerd/containerd/v2 2.4.2 COMMIT".
func versionOf(text string) string {
	for _, word := range strings.Fields(oneLine(text)) {
		digits := strings.TrimPrefix(word, "v")
		if digits != "" && digits[0] >= '0' && digits[0] <= '9' && strings.Contains(digits, ".") {
			return digits
		}
	}
	return "of unknown version"
}

func checkPodman(ctx context.Context, h *Host, _ Options) []Check {
	c := Check{Name: "engine.podman", Status: OK, Uses: "the OCI hook"}
	path, version, missing := h.program(ctx, "podman", "apt-get install podman, if its containers are to be covered")
	if missing != nil {
		missing.Name = c.Name
		return []Check{*missing}
	}
	c.Found = version + " at " + path
	return []Check{c}
}

func checkContainerd(ctx context.Context, h *Host, _ Options) []Check {
	c := Check{Name: "engine.containerd", Status: OK, Uses: "the NRI plugin"}
	const install = "install containerd 2.4 or later, if its containers are to be covered"
	path, version, missing := h.program(ctx, "containerd", install)
	if missing != nil {
		missing.Name = c.Name
		return []Check{*missing}
	}
	c.Found = version + " at " + path
	switch {
	case !atLeast(version, 1, 7):
		c.Status, c.Remedy = Missing, "it has no NRI: "+install
	case !atLeast(version, 2, 2):
		// NRI before 0.10 has no seccomp profiles.
		c.Status, c.Remedy = Error, "its NRI drops the seccomp profiles of plugins: "+install
	case !atLeast(version, 2, 4):
		c.Status, c.Remedy = Warn, "its NRI doesn't tell plugins the image, which {image} and match.images of a policy need: "+install
	}
	return []Check{c}
}

// nriConfig is containerd's configuration of NRI.
type nriConfig struct {
	Disable        bool          `toml:"disable"`
	Socket         string        `toml:"socket_path"`
	PluginPath     string        `toml:"plugin_path"`
	RequestTimeout string        `toml:"plugin_request_timeout"`
	NoConnections  bool          `toml:"disable_connections"`
	Validator      *nriValidator `toml:"default_validator"`
}

type nriValidator struct {
	Enable           bool     `toml:"enable"`
	RejectDefault    bool     `toml:"reject_runtime_default_seccomp_adjustment"`
	RejectUnconfined bool     `toml:"reject_unconfined_seccomp_adjustment"`
	RejectCustom     bool     `toml:"reject_custom_seccomp_adjustment"`
	RequiredPlugins  []string `toml:"required_plugins"`
}

const (
	nriPlugin     = "io.containerd.nri.v1.nri"
	defaultSocket = "/var/run/nri/nri.sock"
	pluginName    = "syslatch" // without the index, as the validator wants it
)

// parseNRI finds NRI's table in containerd's configuration. Without one
// containerd's defaults hold; they are nil then.
func parseNRI(text string) (*nriConfig, error) {
	var config struct {
		Plugins map[string]any `toml:"plugins"`
	}
	if err := toml.Unmarshal([]byte(text), &config); err != nil {
		return nil, err
	}
	table, ok := config.Plugins[nriPlugin]
	if !ok {
		return nil, nil
	}
	// Only this table is decoded strictly typed: others' fields vary by version.
	again, err := toml.Marshal(table)
	if err != nil {
		return nil, err
	}
	n := &nriConfig{}
	if err := toml.Unmarshal(again, n); err != nil {
		return nil, fmt.Errorf("[plugins.'%s']: %w", nriPlugin, err)
	}
	return n, nil
}

// nri reads NRI's configuration as containerd itself understands it, or from
// the file where there is no containerd to ask; from says which. It is nil if
// there is neither.
func (h *Host) nri(ctx context.Context, o Options) (n *nriConfig, from string, err error) {
	file := o.ContainerdConfig
	if path, findErr := h.Find("containerd"); findErr == nil {
		args := []string{"config", "dump"}
		if file != "" {
			args = append([]string{"--config", file}, args...)
		}
		from = "containerd " + strings.Join(args, " ")
		var text string
		if text, err = h.Run(ctx, path, args...); err == nil {
			if n, err = parseNRI(text); err == nil && n != nil {
				return n, from, nil
			}
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", from, err)
		}
	}
	if file == "" {
		file = defaultContainerdConfig
	}
	text, readErr := h.ReadFile(file)
	switch {
	case errors.Is(readErr, fs.ErrNotExist):
		return nil, from, err // containerd's word, if there is one
	case readErr != nil:
		return nil, file, errors.Join(err, readErr)
	}
	n, parseErr := parseNRI(string(text))
	if n == nil {
		return nil, file, errors.Join(err, parseErr) // what containerd would have said may be another
	}
	return n, file, parseErr
}

const enableNRI = "start containerd 2.4 or later (without disable = true in [plugins.'" + nriPlugin + "'] of its configuration), or CRI-O with enable_nri = true"

func checkNRI(ctx context.Context, h *Host, o Options) []Check {
	socket := Check{Name: "nri.socket", Status: OK, Uses: "syslatchd connects to it"}
	validator := Check{Name: "nri.validator", Status: OK, Uses: "keeps containers from running uncovered while the plugin is absent"}
	n, from, err := h.nri(ctx, o)
	path := defaultSocket
	switch {
	case err != nil:
		validator.Status, validator.Found = Error, oneLine(err.Error())
		validator.Remedy = "correct containerd's configuration (containerd config dump must work), or name it with --containerd-config"
	case n == nil:
		validator.Status, validator.Found = Missing, "no configuration of containerd's NRI found"
		validator.Remedy = "with containerd, " + enableValidator + " (--containerd-config names a configuration elsewhere)"
	default:
		if n.Socket != "" {
			path = n.Socket
		}
		n.judge(&validator, from)
	}
	switch {
	case n != nil && n.Disable:
		socket.Status, socket.Found, socket.Remedy = Missing, "NRI is disabled in "+from, enableNRI
	case h.Stat(path) != nil:
		socket.Status, socket.Found, socket.Remedy = Missing, "no socket at "+path, enableNRI
	case n != nil && n.NoConnections:
		socket.Status, socket.Found = Warn, "connections are disabled in "+from
		socket.Remedy = "set disable_connections = false, or let the runtime start the plugin: link 10-syslatch in " + n.PluginPath
	default:
		if err := h.Dial(ctx, path); err != nil {
			socket.Status, socket.Found = Error, oneLine(err.Error())
			socket.Remedy = "start the runtime; a socket that a dead one left behind goes away with its next start. Run this as root"
		} else {
			socket.Found = "accepts connections at " + path
		}
	}
	return []Check{socket, validator}
}

// requestDeadline is the least that a request may take at the runtime's side:
// syslatchd answers before its own deadline, which is below that.
const requestDeadline = time.Second

const validatorTable = "[plugins.'" + nriPlugin + "'.default_validator]"

const enableValidator = `set enable = true and required_plugins = ["` + pluginName + `"] in ` + validatorTable +
	": else containers run uncovered while the plugin is absent"

// judge says what the validator's settings mean for the plugin.
func (n *nriConfig) judge(c *Check, from string) {
	v := n.Validator
	if v == nil || !v.Enable {
		c.Status, c.Found = Warn, "not enabled ("+from+")"
		c.Remedy = enableValidator
		return
	}
	var rejects []string
	for _, r := range []struct {
		set  bool
		name string
	}{
		{v.RejectDefault, "reject_runtime_default_seccomp_adjustment"},
		{v.RejectUnconfined, "reject_unconfined_seccomp_adjustment"},
		{v.RejectCustom, "reject_custom_seccomp_adjustment"},
	} {
		if r.set {
			rejects = append(rejects, r.name)
		}
	}
	c.Found = "enabled (" + from + ")"
	required := "required plugins: none"
	if len(v.RequiredPlugins) > 0 {
		required = "required plugins: " + strings.Join(v.RequiredPlugins, ", ")
	}
	switch timeout, err := time.ParseDuration(n.RequestTimeout); {
	case len(rejects) > 0:
		c.Status, c.Found = Error, c.Found+", "+strings.Join(rejects, ", ")
		c.Remedy = "set " + strings.Join(rejects, " and ") + " to false in " + validatorTable + ": they fail the containers that syslatch sets a profile for"
	case !slices.Contains(v.RequiredPlugins, pluginName):
		c.Status, c.Found = Warn, c.Found+", "+required
		c.Remedy = `add "` + pluginName + `" to required_plugins in ` + validatorTable + ": else containers run uncovered while the plugin is absent"
	case err == nil && timeout < requestDeadline:
		c.Status, c.Found = Warn, c.Found+", plugin_request_timeout "+n.RequestTimeout
		c.Remedy = "set plugin_request_timeout to at least " + requestDeadline.String() + ": the runtime drops a plugin that misses it"
	default:
		c.Found += ", " + required
	}
}
