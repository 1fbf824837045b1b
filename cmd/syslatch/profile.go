// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/syslatch/syslatch/internal/cli"
	"github.com/syslatch/syslatch/internal/policy"
	"github.com/syslatch/syslatch/internal/store"
	"github.com/syslatch/syslatch/profiles"
)

// profileFlags are what every profile command takes.
type profileFlags struct {
	store  string
	output string
}

func (f *profileFlags) addStore(c *cobra.Command) {
	c.Flags().StringVar(&f.store, "store", policy.DefaultStore, "profile store `directory` (the policy file's store)")
	cli.Must(c.MarkFlagDirname("store"))
}

func (f *profileFlags) add(c *cobra.Command) {
	f.addStore(c)
	cli.OutputFlag(c, &f.output)
}

// open opens the store for reading: a directory that isn't there is an error
// and stays so.
func (f *profileFlags) open() (*store.Store, error) {
	s, err := store.Open(f.store, store.Options{ReadOnly: true})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w (syslatchd makes it when it first starts; --store names another)", err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w (run it with sudo, or as a member of the directory's group)", err)
	}
	return s, err
}

func newProfileCommand() *cobra.Command {
	return cli.Group(&cobra.Command{
		Use:   "profile",
		Short: "Read the profile store",
		Long: `Lists workloads and their profile versions, shows a version, prints where its
files are, and makes one the version that is injected. A version is plain OCI
seccomp JSON beside a manifest that says where it came from; both are immutable.
'groups' and 'phases' don't read the store: they show what a policy's phases mean.
'suggest' makes phases of what was recorded.

WORKLOAD is a name as 'syslatch profile list' prints it. A version is a number,
"active" (what is injected; the default) or "newest".`,
		Example: `  syslatch profile list
  syslatch profile list docker.io/library/nginx/web
  syslatch profile show docker.io/library/nginx/web 2
  docker run --security-opt seccomp=$(syslatch profile path docker.io/library/nginx/web) nginx`,
	}, newProfileListCommand(), newProfileShowCommand(), newProfilePathCommand(), newProfileActivateCommand(),
		newProfileGroupsCommand(), newProfilePhasesCommand(), newProfileSuggestCommand())
}

func newProfileListCommand() *cobra.Command {
	var f profileFlags
	c := &cobra.Command{
		Use:   "list [WORKLOAD]",
		Short: "List workloads, or a workload's versions",
		Long: `Lists the store's workloads, or the versions of one. What can be read is listed
even where something else is corrupt; that is then told on standard error, and the
exit status is 1.`,
		Example: `  syslatch profile list
  syslatch profile list -o json
  syslatch profile list docker.io/library/nginx/web`,
		Args:              cli.Args(cobra.MaximumNArgs(1)),
		ValidArgsFunction: f.completeArgs(false),
		RunE: func(c *cobra.Command, args []string) error {
			if err := cli.CheckOutput(f.output); err != nil {
				return err
			}
			s, err := f.open()
			if err != nil {
				return err
			}
			defer s.Close()
			if len(args) == 0 {
				return f.listWorkloads(c, s)
			}
			return f.listVersions(c.OutOrStdout(), s, args[0])
		},
	}
	f.add(c)
	return c
}

func (f *profileFlags) listWorkloads(c *cobra.Command, s *store.Store) error {
	all, corrupt := s.Workloads() // with both, the error is of what isn't in all
	if all == nil {
		return corrupt
	}
	w := c.OutOrStdout()
	var err error
	if f.output == "json" {
		err = writeJSON(w, all)
	} else {
		err = table(w, "WORKLOAD\tVERSIONS\tACTIVE\tRECORDINGS\tUPDATED", func(row func(...any)) {
			for _, x := range all {
				row(x.Workload, x.Versions, orDash(x.Active), x.Observations, x.Updated.Local().Format(time.DateTime))
			}
		})
		if len(all) == 0 && corrupt == nil {
			fmt.Fprintf(c.ErrOrStderr(), "syslatch: nothing has been recorded into %s yet\n", f.store)
		}
	}
	return errors.Join(err, corrupt)
}

// versionRow is one version in `profile list WORKLOAD -o json`.
type versionRow struct {
	profiles.Manifest
	Active bool `json:"active"`
}

func (f *profileFlags) listVersions(w io.Writer, s *store.Store, workload string) error {
	manifests, err := s.Versions(workload)
	if err != nil {
		return err
	}
	active, corrupt := s.Active(workload)
	if errors.Is(corrupt, store.ErrNoVersion) {
		corrupt = nil
	}
	rows := []versionRow{}
	for _, m := range manifests {
		rows = append(rows, versionRow{m, active != nil && active.Manifest.Version == m.Version})
	}
	if f.output == "json" {
		return errors.Join(writeJSON(w, rows), corrupt)
	}
	err = table(w, "VERSION\tACTIVE\tCALLS\tCREATED\tKERNEL\tDIGEST", func(row func(...any)) {
		for _, r := range rows {
			mark := ""
			if r.Active {
				mark = "*"
			}
			row(r.Version, mark, countCalls(r.Calls), r.Created.Local().Format(time.DateTime), r.Kernel, shortDigest(r.Digest))
		}
	})
	return errors.Join(err, corrupt)
}

func newProfileShowCommand() *cobra.Command {
	var f profileFlags
	c := &cobra.Command{
		Use:   "show WORKLOAD [VERSION]",
		Short: "Show a version: where it came from, and what it allows",
		Example: `  syslatch profile show docker.io/library/nginx/web
  syslatch profile show docker.io/library/nginx/web newest
  syslatch profile show docker.io/library/nginx/web 2 -o json | jq .manifest.recordings`,
		Args:              cli.Args(needWorkload(1, 2)),
		ValidArgsFunction: f.completeArgs(true),
		RunE: func(c *cobra.Command, args []string) error {
			s, v, err := f.pick(args)
			if err != nil {
				return err
			}
			defer s.Close()
			if f.output == "json" {
				return writeJSON(c.OutOrStdout(), map[string]any{"manifest": v.Manifest, "profile": v.Profile})
			}
			return showVersion(c.OutOrStdout(), v)
		},
	}
	f.add(c)
	return c
}

func showVersion(w io.Writer, v *profiles.Version) error {
	m := v.Manifest
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(tw, "workload\t%s\n", m.Workload)
	fmt.Fprintf(tw, "version\t%d\n", m.Version)
	fmt.Fprintf(tw, "digest\t%s\n", m.Digest)
	if m.Parent != "" {
		fmt.Fprintf(tw, "parent\t%s\n", m.Parent)
	}
	fmt.Fprintf(tw, "created\t%s\n", m.Created.Local().Format(time.RFC3339))
	fmt.Fprintf(tw, "recordings\t%s\n", strings.Join(m.Recordings, " "))
	fmt.Fprintf(tw, "kernel\t%s\n", m.Kernel)
	if m.Runtime != "" {
		fmt.Fprintf(tw, "runtime\t%s\n", m.Runtime)
	}
	for _, l := range m.Losses {
		fmt.Fprintf(tw, "lost\t%s (%d) %s\n", l.Kind, l.Count, l.Detail)
	}
	for _, list := range []struct {
		what  string
		names []string
	}{
		{"must allow", m.MustAllow},
		{"must deny", m.MustDeny},
		{"start-up", m.Floor}, // allowed without evidence, like the next
		{"incidental", m.Incidental},
	} {
		if len(list.names) > 0 {
			fmt.Fprintf(tw, "%s\t%s\n", list.what, strings.Join(list.names, " "))
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, abi := range m.Calls.ABIs() {
		fmt.Fprintf(w, "\n%s, %d calls recorded:\n%s", abi, len(m.Calls[abi]), wrap(m.Calls[abi], 78))
	}
	return nil
}

func newProfilePathCommand() *cobra.Command {
	var f profileFlags
	c := &cobra.Command{
		Use:   "path WORKLOAD [VERSION]",
		Short: "Print the path of a version's profile",
		Example: `  syslatch profile path docker.io/library/nginx/web
  docker run --security-opt seccomp=$(syslatch profile path docker.io/library/nginx/web) nginx`,
		Args:              cli.Args(needWorkload(1, 2)),
		ValidArgsFunction: f.completeArgs(true),
		RunE: func(c *cobra.Command, args []string) error {
			s, v, err := f.pick(args) // verified: a path to a changed file is not printed
			if err != nil {
				return err
			}
			defer s.Close()
			path, err := s.Path(args[0], v.Manifest.Version)
			if err != nil {
				return err
			}
			if f.output == "json" {
				return writeJSON(c.OutOrStdout(), map[string]any{"path": path, "version": v.Manifest.Version, "digest": v.Manifest.Digest})
			}
			_, err = fmt.Fprintln(c.OutOrStdout(), path)
			return err
		},
	}
	f.add(c)
	return c
}

// activateTimeout bounds the wait for a writer of the same workload, which takes
// milliseconds.
const activateTimeout = 10 * time.Second

func newProfileActivateCommand() *cobra.Command {
	var f profileFlags
	c := &cobra.Command{
		Use:   "activate WORKLOAD VERSION",
		Short: "Make a version the one that is injected",
		Long: `Makes VERSION (a number, or "newest") the version that is injected into containers
created from now on; those that run keep theirs. It needs no restart of syslatchd.

This is how a version gets in force under a policy with activate: manual, and how
to go back to an older one. Under activate: publish, which is the default, the next
recording of the workload activates the newest version again.`,
		Example: `  syslatch profile activate docker.io/library/nginx/web 2
  syslatch profile activate docker.io/library/nginx/web newest`,
		Args:              cli.Args(needWorkload(2, 2)),
		ValidArgsFunction: f.completeArgs(true),
		RunE: func(c *cobra.Command, args []string) error {
			if args[1] == "active" {
				return cli.Usage(errors.New("that is active already: say a version's number, or newest"))
			}
			s, v, err := f.pick(args)
			if err != nil {
				return err
			}
			if err := s.Close(); err != nil {
				return err
			}
			if s, err = store.Open(f.store, store.Options{}); err != nil {
				return err
			}
			defer s.Close()
			ctx, cancel := context.WithTimeout(c.Context(), activateTimeout)
			defer cancel()
			if err := s.SetActive(ctx, args[0], v.Manifest.Version); err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "%s: version %d is active\n", args[0], v.Manifest.Version)
			return err
		},
	}
	f.addStore(c)
	return c
}

func needWorkload(least, most int) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return errors.New("say which workload ('syslatch profile list' shows them)")
		case len(args) < least:
			return errors.New("say which version ('syslatch profile list WORKLOAD' shows them)")
		case len(args) > most:
			return fmt.Errorf("%d arguments, want at most %d: WORKLOAD and VERSION", len(args), most)
		}
		return nil
	}
}

// pick opens the store and reads the version that args name:
// WORKLOAD [N|active|newest].
func (f *profileFlags) pick(args []string) (_ *store.Store, _ *profiles.Version, err error) {
	workload, which := args[0], "active"
	if len(args) > 1 {
		which = args[1]
	}
	n := 0
	if which != "active" && which != "newest" {
		if n, err = strconv.Atoi(strings.TrimPrefix(which, "v")); err != nil || n < 1 {
			return nil, nil, cli.Usage(fmt.Errorf("version %q: want a number from 1, active or newest", which))
		}
	}
	if f.output != "" {
		if err := cli.CheckOutput(f.output); err != nil {
			return nil, nil, err
		}
	}
	s, err := f.open()
	if err != nil {
		return nil, nil, err
	}
	v, err := read(s, workload, which, n)
	if err != nil {
		return nil, nil, errors.Join(err, s.Close())
	}
	return s, v, nil
}

func read(s *store.Store, workload, which string, n int) (*profiles.Version, error) {
	if which == "active" {
		v, err := s.Active(workload)
		if errors.Is(err, store.ErrNoVersion) {
			if all, listErr := s.Versions(workload); listErr == nil && len(all) > 0 {
				err = fmt.Errorf("workload %q: none of its %d versions is active ('newest' names the newest; 'syslatch profile activate' activates one)", workload, len(all))
			}
		}
		return v, err
	}
	if which == "newest" {
		all, err := s.Versions(workload)
		if err != nil {
			return nil, err
		}
		if len(all) == 0 {
			return nil, fmt.Errorf("workload %q: %w", workload, store.ErrNoVersion)
		}
		n = all[len(all)-1].Version
	}
	v, err := s.Version(workload, n)
	if errors.Is(err, store.ErrNoVersion) {
		if all, listErr := s.Versions(workload); listErr == nil && len(all) > 0 {
			err = fmt.Errorf("%w (the newest is %d)", err, all[len(all)-1].Version)
		}
	}
	return v, err
}

// completeArgs offers workloads, and versions of the one that was given if a
// version may follow it.
func (f *profileFlags) completeArgs(version bool) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
		const only = cobra.ShellCompDirectiveNoFileComp
		if len(args) > 1 || len(args) == 1 && !version {
			return nil, only
		}
		s, err := store.Open(f.store, store.Options{ReadOnly: true})
		if err != nil {
			return nil, only
		}
		defer s.Close()
		var offers []string
		if len(args) == 0 {
			all, _ := s.Workloads() // those that can be read
			for _, x := range all {
				offers = append(offers, x.Workload)
			}
		} else {
			offers = []string{"active", "newest"}
			all, _ := s.Versions(args[0]) // an unknown workload has none
			for _, m := range all {
				offers = append(offers, strconv.Itoa(m.Version))
			}
		}
		return slices.DeleteFunc(offers, func(o string) bool { return !strings.HasPrefix(o, prefix) }), only
	}
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table writes rows in aligned columns below a heading.
func table(w io.Writer, heading string, rows func(row func(...any))) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, heading)
	rows(func(cells ...any) {
		for i, c := range cells {
			if i > 0 {
				fmt.Fprint(tw, "\t")
			}
			fmt.Fprint(tw, c)
		}
		fmt.Fprintln(tw)
	})
	return tw.Flush()
}

// orDash prints "-" for a version number that isn't there.
func orDash(n int) string {
	if n == 0 {
		return "-"
	}
	return strconv.Itoa(n)
}

func countCalls(calls profiles.Calls) string {
	var parts []string
	for _, abi := range calls.ABIs() {
		parts = append(parts, fmt.Sprintf("%d %s", len(calls[abi]), strings.ToLower(strings.TrimPrefix(string(abi), "SCMP_ARCH_"))))
	}
	return strings.Join(parts, ", ")
}

// shortDigest is enough of a digest to tell versions apart by eye.
func shortDigest(d string) string {
	if n := len("sha256:") + 12; len(d) > n {
		return d[:n]
	}
	return d
}

// wrap joins words into lines of at most width, each ended by a newline.
func wrap(words []string, width int) string {
	var b strings.Builder
	at := 0
	for _, w := range words {
		switch {
		case at == 0:
		case at+1+len(w) > width:
			b.WriteByte('\n')
			at = 0
		default:
			b.WriteByte(' ')
			at++
		}
		b.WriteString(w)
		at += len(w)
	}
	if at > 0 {
		b.WriteByte('\n')
	}
	return b.String()
}
