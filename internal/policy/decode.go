// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.yaml.in/yaml/v3"
)

// Error is one fault of a file.
type Error struct {
	File    string
	Line    int    // 0 if the fault has no line
	Path    string // "policies[0].mode"; empty for the whole file
	Message string
}

// Error formats as FILE:LINE: PATH: MESSAGE.
func (e *Error) Error() string {
	s := e.File
	if e.Line > 0 {
		s += ":" + strconv.Itoa(e.Line)
	}
	if e.Path != "" {
		s += ": " + e.Path
	}
	return s + ": " + e.Message
}

// Errors are all faults of a file, in the order of its lines, never empty.
type Errors []*Error

// Error has a line for each fault.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

// Unwrap gives the faults to errors.Is and errors.As.
func (e Errors) Unwrap() []error {
	all := make([]error, len(e))
	for i := range e {
		all[i] = e[i]
	}
	return all
}

// Load reads and parses a file. Faults in it are [Errors]; other errors are
// those of reading it.
func Load(path string, opts Options) (*File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return Parse(path, data, opts)
}

// Parse parses a file's content; name stands for the file in errors, which are
// of type [Errors].
func Parse(name string, data []byte, opts Options) (*File, error) {
	d := &decoder{file: name, opts: opts}
	f := d.parse(data)
	if len(d.errs) > 0 {
		slices.SortStableFunc(d.errs, func(a, b *Error) int { return a.Line - b.Line })
		return nil, d.errs
	}
	return f, nil
}

const maxPolicies = 1000

type decoder struct {
	file string
	opts Options
	errs Errors
}

// value is a node with its place.
type value struct {
	*yaml.Node
	path string
	d    *decoder
}

func (v value) errorf(format string, args ...any) {
	v.d.errs = append(v.d.errs, &Error{v.d.file, v.Line, v.path, fmt.Sprintf(format, args...)})
}

// yamlLine finds the line in an error text of the yaml package, which has no
// type for it: "yaml: line 3: did not find ...".
var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

func (d *decoder) parse(data []byte) *File {
	fail := func(line int, message string) *File {
		d.errs = append(d.errs, &Error{File: d.file, Line: line, Message: message})
		return nil
	}
	if len(data) > MaxFileSize {
		return fail(0, fmt.Sprintf("larger than %d bytes", MaxFileSize))
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc, second yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return fail(0, `empty, want at least "apiVersion: `+APIVersion+`" and "policies:"`)
	} else if err != nil {
		return fail(yamlError(err))
	}
	switch err := dec.Decode(&second); {
	case errors.Is(err, io.EOF):
	case err != nil:
		return fail(yamlError(err))
	default:
		return fail(second.Line, "second document, want one per file")
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
		return fail(doc.Line, "not a document")
	}
	return d.decodeFile(value{doc.Content[0], "", d})
}

func yamlError(err error) (line int, message string) {
	text := err.Error()
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		line, _ = strconv.Atoi(m[1]) // "" is 0: no line known
		text = text[len(m[0]):]
	}
	return line, "not valid YAML: " + text
}

func (d *decoder) decodeFile(v value) *File {
	f := &File{Store: DefaultStore, StateDir: DefaultStateDir, BPFFS: DefaultBPFFS, Hook: Hook{TraceSyscall: TraceRefuse}}
	var reliable []bool // whether a policy's match was understood
	seen := v.object(fields{
		"apiVersion": func(v value) {
			if v.stringInto(&f.APIVersion) && f.APIVersion != APIVersion {
				v.errorf("unknown version %s, want %s", quote(f.APIVersion), APIVersion)
			}
		},
		"store":    func(v value) { v.pathInto(&f.Store) },
		"stateDir": func(v value) { v.pathInto(&f.StateDir) },
		"bpffs":    func(v value) { v.pathInto(&f.BPFFS) },
		"nri":      func(v value) { v.nri(&f.NRI) },
		"hook":     func(v value) { v.hook(&f.Hook) },
		"policies": func(v value) {
			v.list(func(v value) {
				p, ok := v.policy()
				f.Policies = append(f.Policies, p)
				reliable = append(reliable, ok)
			})
		},
	})
	if seen == nil {
		return f
	}
	v.require(seen, "apiVersion", APIVersion)
	v.require(seen, "policies", "a list of policies, [] for none")
	// checkOrder compares each with each.
	if len(f.Policies) > maxPolicies {
		v.errorf("%d policies, want at most %d", len(f.Policies), maxPolicies)
		return f
	}
	d.checkOrder(f.Policies, reliable)
	for i := range f.Policies {
		if p := &f.Policies[i]; len(p.Match.Users) > 0 && f.Hook.Rootless.Users == nil && len(d.errs) == 0 {
			d.errs = append(d.errs, &Error{d.file, p.Line, indexed(i) + ".match.users", "matches nothing without hook: {rootless: {users: [NAME]}}, by which syslatchd serves rootless containers"})
		}
	}
	return f
}

func (v value) nri(n *NRI) {
	v.object(fields{
		"socket": func(v value) { v.pathInto(&n.Socket) },
		"pluginName": func(v value) {
			if v.stringInto(&n.PluginName) && !pluginName.MatchString(n.PluginName) {
				v.errorf("%s is no plugin name, want letters, digits, '.', '_' and '-'", quote(n.PluginName))
			}
		},
		"pluginIndex": func(v value) {
			// Unquoted, 10 is an integer and 05 an octal one: the text counts.
			if !v.scalarInto(&n.PluginIndex, "two digits") {
				return
			}
			if !pluginIndex.MatchString(n.PluginIndex) {
				v.errorf(`%s is no plugin index, want two digits such as "10"`, quote(n.PluginIndex))
			}
		},
		"requestTimeout": func(v value) {
			var s string
			if !v.stringInto(&s) {
				return
			}
			t, err := time.ParseDuration(s)
			if err != nil || t < 10*time.Millisecond || t > time.Minute {
				v.errorf("%s is no timeout, want 10ms to 1m, such as 1500ms", quote(s))
				return
			}
			n.RequestTimeout = t
		},
	})
}

func (v value) hook(h *Hook) {
	var directoriesAt value
	faults := len(v.d.errs)
	seen := v.object(fields{
		"traceSyscall": func(v value) {
			choiceInto(v, &h.TraceSyscall, []TraceSyscall{TraceRefuse, TraceServe, TraceIgnore})
		},
		"rootless": func(v value) { v.rootless(&h.Rootless) },
		"traceDirectories": func(v value) {
			directoriesAt = v
			v.nonEmptyList(func(v value) {
				var dir string
				switch v.pathInto(&dir); {
				case dir == "":
				case dir == "/":
					v.errorf("lets every file be replaced, want a directory of its own such as /var/lib/syslatch/traces")
				case slices.Contains(h.TraceDirectories, dir):
					v.errorf("%s is listed twice", dir)
				default:
					h.TraceDirectories = append(h.TraceDirectories, dir)
				}
			})
		},
	})
	switch {
	case seen == nil, len(v.d.errs) > faults:
	case h.TraceSyscall == TraceServe:
		v.require(seen, "traceDirectories", "the directories that traces may be written to")
	case seen["traceDirectories"]:
		directoriesAt.errorf("has no effect without traceSyscall: serve")
	}
}

func (v value) rootless(r *Rootless) {
	r.Socket = DefaultRootlessSocket
	seen := v.object(fields{
		"users": func(v value) {
			v.nonEmptyList(func(v value) {
				// Unquoted, 1000 is an integer.
				var u string
				switch {
				case !v.scalarInto(&u, "a user's name or uid"):
				case !userName.MatchString(u) && !userID.MatchString(u):
					v.errorf("%s is no user, want a name or a uid such as alice or 1000", quote(u))
				case u == "root" || u == "0":
					v.errorf("root's containers need no daemon: the hook serves them by itself")
				case slices.Contains(r.Users, u):
					v.errorf("%s is listed twice", u)
				default:
					r.Users = append(r.Users, u)
				}
			})
		},
		"socket": func(v value) {
			// sun_path takes 108 bytes, with the NUL (unix(7)).
			if v.pathInto(&r.Socket); len(r.Socket) > 107 {
				v.errorf("is %d bytes long, a socket's path has 107 at most", len(r.Socket))
			}
		},
	})
	if seen != nil {
		v.require(seen, "users", "the users whose rootless containers are served")
	}
}

var (
	userName    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9._-]{0,63}$`)
	userID      = regexp.MustCompile(`^(0|[1-9][0-9]{0,9})$`)
	pluginName  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	pluginIndex = regexp.MustCompile(`^[0-9]{2}$`)
	policyName  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	callName    = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,63}$`)
	labelName   = regexp.MustCompile(`^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$`)
	device      = regexp.MustCompile(`^[0-9]{1,4}:[0-9]{1,7}$`)
)

// policy also reports whether the match could be understood.
func (v value) policy() (Policy, bool) {
	understood := false
	p := Policy{Line: v.Line, Workload: DefaultWorkload, ExistingProfile: ExistingKeep, Activate: ActivatePublish}
	var modeAt, denyAt, allowedAt, phasesAt, logAt value
	seen := v.object(fields{
		"name": func(v value) {
			if v.stringInto(&p.Name) && !policyName.MatchString(p.Name) {
				v.errorf("%s is no policy name, want 1 to 63 letters, digits, '.', '_' and '-', the first no punctuation", quote(p.Name))
			}
		},
		"match": func(v value) {
			faults := len(v.d.errs)
			v.match(&p.Match)
			understood = len(v.d.errs) == faults
		},
		"mode":     func(v value) { modeAt = v; choiceInto(v, &p.Mode, modes) },
		"workload": func(v value) { v.templateInto(&p.Workload) },
		"annotations": func(v value) {
			p.Annotations = choices(v, []AnnotationField{FieldMode, FieldWorkload, FieldPhase})
		},
		"allowedModes": func(v value) { allowedAt = v; p.AllowedModes = choices(v, modes) },
		"limits":       func(v value) { v.limits(&p.Limits) },
		"mustAllow":    func(v value) { p.MustAllow = v.calls() },
		"mustDeny":     func(v value) { denyAt = v; p.MustDeny = v.calls() },
		"architectures": func(v value) {
			p.Architectures = choices(v, architectures)
		},
		"existingProfile": func(v value) {
			choiceInto(v, &p.ExistingProfile, []ExistingProfile{ExistingKeep, ExistingReplace})
		},
		"activate":    func(v value) { choiceInto(v, &p.Activate, []Activate{ActivatePublish, ActivateManual}) },
		"failure":     func(v value) { choiceInto(v, &p.Failure, []Failure{FailureDeny, FailureRuntimeDefault}) },
		"allowLosses": func(v value) { v.boolInto(&p.AllowLosses) },
		"phases":      func(v value) { phasesAt = v },
		"logDenials":  func(v value) { logAt = v; v.boolInto(&p.LogDenials) },
	})
	if seen == nil {
		return p, false
	}
	if seen["phases"] { // what they may be depends on other fields
		phasesAt.phases(&p)
	}
	v.require(seen, "name", "a name for logs")
	v.require(seen, "match", "{} to match every container")
	v.require(seen, "mode", oneOf(modes))

	choosesMode := slices.Contains(p.Annotations, FieldMode)
	switch {
	case choosesMode && !seen["allowedModes"]:
		v.errorf("annotations has mode, so allowedModes is required: the modes that a pod may choose")
	case !choosesMode && seen["allowedModes"] && allowedAt.Node != nil:
		allowedAt.errorf("has no effect without mode in annotations")
	}
	if slices.Contains(p.Annotations, FieldPhase) && !seen["phases"] {
		v.errorf("annotations has phase, and there are no phases to choose from")
	}
	if seen["phases"] && p.Mode == ModeAudit && !slices.ContainsFunc(p.AllowedModes, Mode.hasPhases) {
		modeAt.errorf("%s knows no phases, they would have no effect; want record or enforce, or one of them among allowedModes", p.Mode)
	}
	if p.LogDenials && !seen["phases"] {
		logAt.errorf("has no effect without phases")
	}
	for _, call := range p.MustDeny {
		if slices.Contains(p.MustAllow, call) {
			denyAt.errorf("%s is in mustAllow too, want it in one of the two", call)
		}
	}
	// Settings under mode off would be dropped without a word.
	if p.Mode == ModeOff && !slices.ContainsFunc(p.AllowedModes, func(m Mode) bool { return m != ModeOff }) {
		for _, name := range []string{"limits", "mustAllow", "mustDeny", "failure", "workload", "phases"} {
			if seen[name] {
				modeAt.errorf("off leaves the container alone, %s would have no effect", name)
			}
		}
	}
	return p, understood
}

// architectures are the ABIs that the runtime-spec names.
var architectures = []specs.Arch{
	specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64,
	specs.ArchMIPS, specs.ArchMIPS64, specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64,
	specs.ArchMIPSEL64N32, specs.ArchPPC, specs.ArchPPC64, specs.ArchPPC64LE, specs.ArchS390,
	specs.ArchS390X, specs.ArchPARISC, specs.ArchPARISC64, specs.ArchRISCV64,
	specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
}

func (v value) match(m *Match) {
	var at value
	v.object(fields{
		"users": func(v value) {
			at = v
			v.nonEmptyList(func(v value) {
				var p string
				if !v.scalarInto(&p, "a pattern of users' names or uids") {
					return
				}
				if err := checkGlob(p); err != nil {
					v.errorf("%v", err)
					return
				}
				m.Users = append(m.Users, p)
			})
		},
		"namespaces": func(v value) { m.Namespaces = v.globs(checkGlob) },
		"containers": func(v value) { m.Containers = v.globs(checkGlob) },
		"images": func(v value) {
			m.Images = v.globs(func(p string) error { return checkGlob(imagePattern(p)) })
		},
		"podLabels": func(v value) {
			m.PodLabels = v.strings(func(v value, key, pattern string) {
				for _, err := range []error{checkLabel(key), checkGlob(pattern)} {
					if err != nil {
						v.errorf("%v", err)
					}
				}
			})
		},
	})
	if len(m.Users) > 0 && (len(m.Namespaces) > 0 || len(m.PodLabels) > 0) {
		at.errorf("matches nothing beside namespaces and podLabels: rootless containers have none")
	}
}

func (v value) globs(check func(string) error) []string {
	var patterns []string
	v.nonEmptyList(func(v value) {
		var p string
		if !v.stringInto(&p) {
			return
		}
		if err := check(p); err != nil {
			v.errorf("%v", err)
			return
		}
		patterns = append(patterns, p)
	})
	return patterns
}

func (v value) templateInto(s *string) {
	if !v.stringInto(s) {
		return
	}
	name, err := expand(*s, func(placeholder string) (string, error) {
		if key, ok := strings.CutPrefix(placeholder, "label:"); ok {
			return "x", checkLabel(key)
		}
		if !slices.Contains(placeholderNames, placeholder) {
			return "", fmt.Errorf("unknown placeholder {%s}, want {namespace}, {pod}, {container}, {image}, {tag} or {label:KEY}%s",
				placeholder, suggest(placeholder, placeholderNames))
		}
		return "x", nil
	})
	if err == nil {
		err = checkTemplate(*s)
	}
	if err == nil {
		err = checkWorkload(name)
	}
	if err != nil {
		v.errorf("%v", err)
	}
}

// checkLabel refuses a key that no pod's label can have: what can't match is a
// mistake.
func checkLabel(key string) error {
	if !labelName.MatchString(key) {
		return fmt.Errorf("%s is no name of a label, want it as in Kubernetes, such as app or example.com/tier", quote(key))
	}
	return nil
}

// calls reads a list of system call names, sorted and without repeats.
func (v value) calls() []string {
	var names []string
	v.nonEmptyList(func(v value) {
		var name string
		switch {
		case !v.callInto(&name):
		case slices.Contains(names, name):
			v.errorf("%s is listed twice", name)
		default:
			names = append(names, name)
		}
	})
	slices.Sort(names)
	return names
}

func (v value) callInto(name *string) bool {
	switch {
	case !v.stringInto(name):
	case !callName.MatchString(*name):
		v.errorf("%s is no system call name, want lower case letters, digits and '_', such as openat", quote(*name))
	case v.d.opts.KnownCall != nil && !v.d.opts.KnownCall(*name):
		v.errorf("unknown system call %s, want a name as in libseccomp's tables ('scmp_sys_resolver NAME' prints -1 for what is none)", quote(*name))
	default:
		return true
	}
	return false
}

func (v value) limits(l *Limits) {
	memory := map[string]value{} // for errors that concern two fields
	bytes := func(name string, into **int64, least int64) func(value) {
		return func(v value) {
			memory[name] = v
			v.bytesInto(into, least)
		}
	}
	ioSeen, cpuSeen := map[string]bool{}, map[string]bool{}
	v.object(fields{
		"memory": func(v value) {
			m := &l.Memory
			v.object(fields{
				// A page is the least that memory.max can hold, and NRI takes 0
				// for "not given".
				"max": bytes("max", &m.Max, 4096), "high": bytes("high", &m.High, 0),
				"swapMax": bytes("swapMax", &m.SwapMax, 0), "low": bytes("low", &m.Low, 0), "min": bytes("min", &m.Min, 0),
			})
			for _, other := range []struct {
				name  string
				value *int64
			}{{"high", m.High}, {"low", m.Low}, {"min", m.Min}} {
				if m.Max != nil && other.value != nil && *m.Max != Unlimited && (*other.value == Unlimited || *other.value > *m.Max) {
					memory[other.name].errorf("is above memory.max, so it has no effect; want at most %d", *m.Max)
				}
			}
		},
		"cpu": func(v value) {
			cpuSeen = v.object(fields{
				"max": func(v value) {
					var s string
					if !v.scalarInto(&s, `an amount of CPU such as "50%", 1.5 or "50000 100000"`) {
						return
					}
					var err error
					if l.CPU.Quota, l.CPU.Period, err = parseCPU(s); err != nil {
						v.errorf("%v", err)
					}
				},
				"weight": func(v value) { v.weightInto(&l.CPU.Weight) },
			})
		},
		"pids": func(v value) {
			v.object(fields{"max": func(v value) {
				if n, ok := v.number(1, 1<<22, true); ok { // the kernel's PID_MAX_LIMIT
					l.Pids = &n
				}
			}})
		},
		"io": func(v value) {
			ioSeen = v.object(fields{
				"weight": func(v value) { v.weightInto(&l.IO.Weight) },
				"max":    func(v value) { v.nonEmptyList(func(v value) { l.IO.Max = append(l.IO.Max, v.ioMax()) }) },
			})
		},
		"unified": func(v value) {
			l.Unified = v.strings(func(v value, key, text string) {
				if err := checkUnified(key, text); err != nil {
					v.errorf("%v", err)
				}
			})
		},
		"oomScoreAdj": func(v value) {
			if n, ok := v.number(-1000, 1000, false); ok {
				i := int(n)
				l.OOMScoreAdj = &i
			}
		},
		"rlimits": func(v value) { v.nonEmptyList(func(v value) { l.Rlimits = append(l.Rlimits, v.rlimit(l.Rlimits)) }) },
	})
	given := map[string]bool{
		"memory.max": l.Memory.Max != nil, "memory.high": l.Memory.High != nil, "memory.swap.max": l.Memory.SwapMax != nil,
		"memory.low": l.Memory.Low != nil, "memory.min": l.Memory.Min != nil,
		"cpu.max": cpuSeen["max"], "cpu.weight": cpuSeen["weight"], "pids.max": l.Pids != nil,
		"io.max": ioSeen["max"], "io.weight": ioSeen["weight"],
	}
	for _, key := range sortedKeys(l.Unified) {
		if given[key] {
			v.errorf("unified has %s, which is given by its own field too, want it once", key)
		}
	}
}

func (v value) ioMax() IOMax {
	var m IOMax
	bytes := func(into *int64) func(value) {
		return func(v value) {
			var n *int64
			if v.bytesInto(&n, 1); n != nil {
				*into = *n
			}
		}
	}
	count := func(into *int64) func(value) {
		return func(v value) {
			if n, ok := v.number(1, 1<<53, true); ok {
				*into = n
			}
		}
	}
	seen := v.object(fields{
		"device": func(v value) {
			// 8:16 is a base-60 integer to YAML 1.1; the text counts.
			if v.scalarInto(&m.Device, `"MAJOR:MINOR"`) && !device.MatchString(m.Device) {
				v.errorf(`%s is no block device, want "MAJOR:MINOR" as in lsblk, such as "8:0"`, quote(m.Device))
			}
		},
		"rbps": bytes(&m.RBPS), "wbps": bytes(&m.WBPS), "riops": count(&m.RIOPS), "wiops": count(&m.WIOPS),
	})
	if seen != nil {
		v.require(seen, "device", `"MAJOR:MINOR" as in lsblk`)
		if len(seen) == 1 && seen["device"] {
			v.errorf("limits nothing, want at least one of rbps, wbps, riops and wiops")
		}
	}
	return m
}

func (v value) rlimit(before []Rlimit) Rlimit {
	var r Rlimit
	number := func(into *uint64) func(value) {
		return func(v value) {
			var s string
			if !v.scalarInto(&s, "a number or unlimited") {
				return
			}
			if s == "unlimited" {
				*into = ^uint64(0)
				return
			}
			n, err := strconv.ParseUint(s, 10, 63)
			if err != nil {
				v.errorf(`%s is no limit, want a number from 0 to 2^63-1 or "unlimited"`, quote(s))
			}
			*into = n
		}
	}
	seen := v.object(fields{
		"type": func(v value) { choiceInto(v, &r.Type, rlimitTypes) },
		"soft": number(&r.Soft), "hard": number(&r.Hard),
	})
	if seen == nil {
		return r
	}
	for _, name := range []string{"type", "soft", "hard"} {
		v.require(seen, name, "type, soft and hard")
	}
	if len(seen) == 3 && r.Soft > r.Hard {
		v.errorf("soft limit %d is above the hard limit %d", r.Soft, r.Hard)
	}
	if r.Type != "" && slices.ContainsFunc(before, func(b Rlimit) bool { return b.Type == r.Type }) {
		v.errorf("%s is given twice", r.Type)
	}
	return r
}

// The rest is strict YAML, whatever the schema.

type fields map[string]func(value)

// object calls a field's function for each field present, and returns their
// names, or nil if v is no mapping.
func (v value) object(known fields) map[string]bool {
	if v.Kind != yaml.MappingNode || v.ShortTag() != "!!map" {
		v.errorf("is %s, want a mapping with %s", v.describe(), oneOf(sortedKeys(known)))
		return nil
	}
	seen := map[string]bool{}
	lines := map[string]int{}
	for i := 0; i+1 < len(v.Content); i += 2 {
		key := v.Content[i]
		name := key.Value
		at := value{key, v.join(name), v.d}
		if key.Kind != yaml.ScalarNode {
			value{key, v.path, v.d}.errorf("key is %s, want a name", at.describe())
			continue
		}
		if line, ok := lines[name]; ok {
			at.errorf("given twice, first on line %d", line)
			continue
		}
		lines[name] = key.Line
		decode, ok := known[name]
		if !ok {
			at.path = v.join(printable(name))
			at.errorf("unknown field, want %s%s", oneOf(sortedKeys(known)), suggest(name, sortedKeys(known)))
			continue
		}
		seen[name] = true
		decode(value{v.Content[i+1], at.path, v.d})
	}
	return seen
}

// strings reads a mapping of strings that isn't empty.
func (v value) strings(check func(at value, key, text string)) map[string]string {
	if v.Kind != yaml.MappingNode || v.ShortTag() != "!!map" || len(v.Content) == 0 {
		v.errorf("is %s, want a mapping of strings; leave the field out for none", v.describe())
		return nil
	}
	out := map[string]string{}
	lines := map[string]int{}
	for i := 0; i+1 < len(v.Content); i += 2 {
		key, val := value{v.Content[i], v.path, v.d}, value{v.Content[i+1], v.path, v.d}
		var name, text string
		if !key.scalarInto(&name, "a name") {
			continue
		}
		val.path += "[" + printable(name) + "]"
		if line, ok := lines[name]; ok {
			value{key.Node, val.path, v.d}.errorf("given twice, first on line %d", line)
			continue
		}
		lines[name] = key.Line
		// A number is meant as its text here; a boolean may not be.
		if val.Kind == yaml.ScalarNode && (val.ShortTag() == "!!int" || val.ShortTag() == "!!float") {
			text = val.Value
		} else if !val.stringInto(&text) {
			continue
		}
		check(val, name, text)
		out[name] = text
	}
	return out
}

func (v value) list(each func(value)) {
	if v.Kind != yaml.SequenceNode || v.ShortTag() != "!!seq" {
		v.errorf("is %s, want a list", v.describe())
		return
	}
	for i, n := range v.Content {
		each(value{n, fmt.Sprintf("%s[%d]", v.path, i), v.d})
	}
}

func (v value) nonEmptyList(each func(value)) {
	if v.Kind == yaml.SequenceNode && len(v.Content) == 0 {
		v.errorf("is an empty list; leave the field out for none")
		return
	}
	v.list(each)
}

func (v value) stringInto(s *string) bool {
	if v.Kind != yaml.ScalarNode || v.ShortTag() != "!!str" {
		hint := ""
		if v.Kind == yaml.ScalarNode && v.ShortTag() != "!!null" {
			hint = " (put it in quotes)"
		}
		v.errorf("is %s, want a string%s", v.describe(), hint)
		return false
	}
	return v.textInto(s)
}

// scalarInto takes the text of a string or number.
func (v value) scalarInto(s *string, want string) bool {
	if v.Kind == yaml.ScalarNode && slices.Contains([]string{"!!str", "!!int", "!!float", "!!timestamp"}, v.ShortTag()) {
		return v.textInto(s)
	}
	v.errorf("is %s, want %s", v.describe(), want)
	return false
}

func (v value) textInto(s *string) bool {
	if v.Value == "" {
		v.errorf("is empty")
		return false
	}
	for _, r := range v.Value {
		if r != '\n' && unicode.IsControl(r) {
			v.errorf("has the control character %q", r)
			return false
		}
	}
	*s = v.Value
	return true
}

func (v value) boolInto(b *bool) {
	if v.Kind != yaml.ScalarNode || v.ShortTag() != "!!bool" {
		v.errorf("is %s, want true or false", v.describe())
		return
	}
	*b = strings.EqualFold(v.Value, "true")
}

// number reads a decimal integer, and "max" as [Unlimited] where allowed.
func (v value) number(least, most int64, unlimited bool) (int64, bool) {
	want := fmt.Sprintf("a number from %d to %d", least, most)
	if unlimited {
		want += ` or "max"`
	}
	var s string
	if !v.scalarInto(&s, want) {
		return 0, false
	}
	if unlimited && s == "max" {
		return Unlimited, true
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < least || n > most {
		v.errorf("%s is not allowed, want %s", quote(s), want)
		return 0, false
	}
	return n, true
}

func (v value) weightInto(w *uint64) {
	if n, ok := v.number(1, 10000, false); ok {
		*w = uint64(n)
	}
}

func (v value) bytesInto(into **int64, least int64) {
	var s string
	if !v.scalarInto(&s, `a number of bytes such as 64Mi, or "max"`) {
		return
	}
	n := Unlimited
	if s != "max" {
		var err error
		if n, err = parseBytes(s); err != nil {
			v.errorf("%v", err)
			return
		}
		if n < least {
			v.errorf("%s is less than %d bytes", quote(s), least)
			return
		}
	}
	*into = &n
}

func (v value) pathInto(s *string) {
	var p string
	if !v.stringInto(&p) {
		return
	}
	if !filepath.IsAbs(p) || strings.Contains(p, "\n") || len(p) > 1024 {
		v.errorf("%s is no absolute path", quote(p))
		return
	}
	if clean := filepath.Clean(p); clean != p {
		v.errorf("%s is not the shortest form of the path, want %s", quote(p), clean)
		return
	}
	*s = p
}

func choiceInto[S ~string](v value, into *S, allowed []S) {
	if v.Kind != yaml.ScalarNode || v.ShortTag() != "!!str" {
		v.errorf("is %s, want %s", v.describe(), oneOf(allowed))
		return
	}
	var s string
	if !v.textInto(&s) {
		return
	}
	if !slices.Contains(allowed, S(s)) {
		v.errorf("unknown value %s, want %s%s", quote(s), oneOf(allowed), suggest(s, allowed))
		return
	}
	*into = S(s)
}

func choices[S ~string](v value, allowed []S) []S {
	var out []S
	v.nonEmptyList(func(v value) {
		var c S
		if choiceInto(v, &c, allowed); c == "" {
			return
		}
		if slices.Contains(out, c) {
			v.errorf("%s is listed twice", c)
			return
		}
		out = append(out, c)
	})
	return out
}

func (v value) require(seen map[string]bool, name, want string) {
	if !seen[name] && !v.has(name) {
		value{v.Node, v.join(name), v.d}.errorf("is required, want %s", want)
	}
}

func (v value) has(name string) bool {
	for i := 0; i+1 < len(v.Content); i += 2 {
		if v.Content[i].Value == name {
			return true
		}
	}
	return false
}

func (v value) join(name string) string {
	if v.path == "" {
		return name
	}
	return v.path + "." + name
}

// describe says what a node is, for "is ..., want ...".
func (v value) describe() string {
	switch v.Kind {
	case yaml.MappingNode:
		if v.ShortTag() == "!!map" {
			return "a mapping"
		}
	case yaml.SequenceNode:
		if v.ShortTag() == "!!seq" {
			return "a list"
		}
	case yaml.AliasNode:
		return "an alias (write the value out instead)"
	case yaml.ScalarNode:
		switch v.ShortTag() {
		case "!!null":
			return "empty"
		case "!!bool":
			return "the boolean " + quote(v.Value)
		case "!!int", "!!float":
			return "the number " + quote(v.Value)
		case "!!str":
			return "the string " + quote(v.Value)
		}
	}
	return "of YAML type " + quote(v.ShortTag())
}

// printable bounds a key from the file for use in a path.
func printable(s string) string {
	if q := quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// suggest offers the closest of the choices if it is close.
func suggest[S ~string](got string, choices []S) string {
	if len(got) > 64 {
		return ""
	}
	best, least := "", 3 // edits
	got = strings.ToLower(got)
	for _, c := range choices {
		lower := strings.ToLower(string(c))
		if strings.HasSuffix(lower, "_"+got) { // x86_64, NOFILE
			best = string(c)
			break
		}
		if n := distance(got, lower); n < least && n < len(c) {
			best, least = string(c), n
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", best)
}

// distance is the number of edits (insert, delete, replace, swap of
// neighbours) between two strings.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		for j := range rows[i] {
			switch {
			case i == 0:
				rows[i][j] = j
			case j == 0:
				rows[i][j] = i
			default:
				cost := 1
				if a[i-1] == b[j-1] {
					cost = 0
				}
				rows[i][j] = min(rows[i-1][j]+1, rows[i][j-1]+1, rows[i-1][j-1]+cost)
				if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
					rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
				}
			}
		}
	}
	return rows[len(a)][len(b)]
}
