package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// slotState is the current state of one slot.
type slotState struct {
	slot
	hookRules   []listed
	generations [2]generationState
}

type generationState struct {
	exists bool
	rules  []listed
	good   bool     // The rules are exactly the expected ones, in the expected order.
	jumps  []listed // The rules of the hook that jump here, in order.
}

// difference is one difference between a slot and its expected state.
type difference struct {
	what string // One of a fixed set, see Sync.
	text string // For logs and errors.
}

func readSlot(t tables, s slot) (slotState, error) {
	state := slotState{slot: s}
	var err error
	if state.hookRules, err = t.list(s.table, s.hook); err != nil && !errors.Is(err, errNoChain) {
		return state, err
	}
	for g := range generations {
		rules, err := t.list(s.table, s.chain(g))
		if errors.Is(err, errNoChain) {
			continue
		}
		if err != nil {
			return state, err
		}
		found := generationState{exists: true, rules: rules, good: slices.EqualFunc(rules, s.rules, listed.is)}
		for _, rule := range state.hookRules {
			if rule.target() == s.chain(g) {
				found.jumps = append(found.jumps, rule)
			}
		}
		state.generations[g] = found
	}
	return state, nil
}

// foreign returns ErrForeignChain if one of the slot's chains has rules, none of them has NMI's comment, and no jump
// from the hook to the chain has NMI's comment. An empty chain is not foreign: a crash of NMI can leave one. A chain
// that has rules of NMI and other rules is a chain of NMI that another program changed.
func (st slotState) foreign() error {
	for g, found := range st.generations {
		if isForeign(found.rules, found.jumps) {
			return foreignChain(st.table, st.chain(g))
		}
	}
	return nil
}

func isForeign(rules, jumps []listed) bool {
	return len(rules) > 0 && !slices.ContainsFunc(rules, listed.ours) && !slices.ContainsFunc(jumps, listed.ours)
}

func foreignChain(table, chain string) error {
	return fmt.Errorf("%w: no rule of chain %s of table %s has a comment of NMI (%q); NMI did not change the chain: find out which program created the chain, then rename or delete the chain",
		ErrForeignChain, chain, table, strings.TrimSpace(marker)+" ...")
}

// inForce returns the active generation: the one whose jump is the first rule of the hook, exactly as we write it. It
// returns -1 if there is none.
func (st slotState) inForce() int {
	for g := range generations {
		if len(st.hookRules) > 0 && st.hookRules[0].is(st.jump(g)) {
			return g
		}
	}
	return -1
}

func (st slotState) find(match func(generationState) bool) int {
	return slices.IndexFunc(st.generations[:], match)
}

// differences compares the slot with its expected state: one complete generation with a single jump, which is the first
// rule of the hook, and no other generation.
func (st slotState) differences() []difference {
	var ds []difference
	report := func(what, format string, args ...any) {
		ds = append(ds, difference{what: st.name + " " + what, text: fmt.Sprintf(format, args...)})
	}
	current := st.inForce()
	switch {
	case current >= 0 && len(st.generations[current].jumps) > 1:
		report("jump", "%s jumps to %s %d times instead of once", st.hook, st.chain(current), len(st.generations[current].jumps))
	case current < 0:
		if current = st.find(func(g generationState) bool { return len(g.jumps) > 0 }); current >= 0 {
			report("jump", "the jump from %s to %s is changed or is not the first rule; the first rule is: %s", st.hook, st.chain(current), st.hookRules[0])
			break
		}
		report("jump", "%s has no jump to %s or %s", st.hook, st.chain(0), st.chain(1))
		if current = st.find(func(g generationState) bool { return g.good }); current < 0 {
			current = st.find(func(g generationState) bool { return g.exists })
		}
	}
	if current < 0 {
		report("chain", "neither chain %s nor chain %s exists", st.chain(0), st.chain(1))
		return ds
	}
	if found := st.generations[current]; !found.good {
		report("chain", "%s", st.compare(current))
	}
	if st.generations[1-current].exists {
		report("leftover", "chain %s is left over, for example from an interrupted repair", st.chain(1-current))
	}
	return ds
}

func (st slotState) compare(g int) string {
	var parts []string
	rules := st.generations[g].rules
	for _, want := range st.rules {
		if !slices.ContainsFunc(rules, func(r listed) bool { return r.is(want) }) {
			parts = append(parts, "missing: "+strings.Join(want, " "))
		}
	}
	for _, rule := range rules {
		if !slices.ContainsFunc(st.rules, rule.is) {
			parts = append(parts, "unexpected: "+rule.String())
		}
	}
	if parts == nil {
		parts = []string{"the rules are repeated or in another order"}
	}
	return fmt.Sprintf("%s: %s", st.chain(g), strings.Join(parts, ", "))
}

// repairSlot brings one slot to its expected state. Between any two commands the slot blocks at least as much as
// before: rules are added to a generation only while the hook does not jump to it, and a generation with a jump is
// emptied only after the jump to a complete generation is the first rule of the hook. generationToBuild describes
// the exception.
func repairSlot(ctx context.Context, t tables, st slotState) error {
	var err error
	if st, err = freeGeneration(ctx, t, st); err != nil {
		return err
	}
	if g := st.inForce(); g >= 0 && st.generations[g].good && len(st.generations[g].jumps) == 1 {
		return discard(ctx, t, st, 1-g)
	}
	// A complete generation without a jump needs only the jump.
	target := st.find(func(g generationState) bool { return g.good && len(g.jumps) == 0 })
	if target < 0 {
		target = st.generationToBuild()
		if err := build(ctx, t, st, target); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := t.insertFirst(st.table, st.hook, st.jump(target)); err != nil {
		return err
	}
	now, err := readSlot(t, st.slot)
	if err != nil {
		return err
	}
	if now.inForce() != target || !now.generations[target].good {
		// The other generation stays in place, so the slot blocks at least as much as before. The next Sync reads the
		// rules again and repairs them.
		return fmt.Errorf("the jump to %s is no longer the first rule of %s, or the rules of the NMI chain differ from those that NMI just wrote: another program changes rules at the same time, or the iptables program lists rules in a form that NMI does not know",
			st.chain(target), st.hook)
	}
	return discard(ctx, t, now, 1-target)
}

// freeGeneration removes one generation if both have jumps and one of them is complete. That is the state after an
// interrupted repair. Another program may since have inserted rules before the jump to the complete generation. So,
// unless that jump is the first rule, freeGeneration inserts a jump to the complete generation at position 1 before it
// removes the other generation.
func freeGeneration(ctx context.Context, t tables, st slotState) (slotState, error) {
	if len(st.generations[0].jumps) == 0 || len(st.generations[1].jumps) == 0 {
		return st, nil
	}
	complete := st.inForce()
	if complete < 0 || !st.generations[complete].good {
		if complete = st.find(func(g generationState) bool { return g.good }); complete < 0 {
			return st, nil
		}
		if err := t.insertFirst(st.table, st.hook, st.jump(complete)); err != nil {
			return st, err
		}
	}
	if err := discard(ctx, t, st, 1-complete); err != nil {
		return st, err
	}
	return readSlot(t, st.slot)
}

// generationToBuild returns the generation to rebuild: one without a jump, if there is one. Both can have jumps here if
// a repair was interrupted and neither generation has the expected rules, for example after an upgrade with another
// configuration. Then generationToBuild returns an empty generation, or if neither is empty the one that packets reach
// second. Until that generation is rebuilt, packets pass only through the other one. If another program changed the two
// differently, the other one alone may block less than both together. This is the exception to the rule that a repair
// opens no gap.
func (st slotState) generationToBuild() int {
	if free := st.find(func(g generationState) bool { return len(g.jumps) == 0 }); free >= 0 {
		return free
	}
	if empty := st.find(func(g generationState) bool { return len(g.rules) == 0 }); empty >= 0 {
		return empty
	}
	for _, rule := range st.hookRules {
		switch rule.target() {
		case st.chain(0):
			return 1
		case st.chain(1):
			return 0
		}
	}
	return 0
}

// build removes the jumps to a generation and writes its rules.
func build(ctx context.Context, t tables, st slotState, g int) error {
	if err := retire(ctx, t, st, g); err != nil {
		return err
	}
	// Also creates the chain if it does not exist.
	if err := t.empty(st.table, st.chain(g)); err != nil {
		return err
	}
	for _, rule := range st.rules {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.add(st.table, st.chain(g), rule); err != nil {
			return err
		}
	}
	return nil
}

// retire empties a generation and then removes the jumps to it. The order matters. A crash between the two steps leaves
// an empty chain, which counts as a chain of NMI. In the reverse order a crash could leave a chain with rules and
// without a jump: if another program had replaced the rules, NMI would take the chain for a foreign one. Jumps are
// deleted by their text, never by their number, because the number may since have become that of a foreign rule.
func retire(ctx context.Context, t tables, st slotState, g int) error {
	if !st.generations[g].exists {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := t.empty(st.table, st.chain(g)); err != nil {
		return err
	}
	for _, jump := range st.generations[g].jumps {
		if err := t.remove(st.table, st.hook, jump.args); err != nil {
			return err
		}
	}
	return nil
}

// discard removes a generation that is no longer needed, and the jumps to it.
func discard(ctx context.Context, t tables, st slotState, g int) error {
	if !st.generations[g].exists {
		return nil
	}
	if err := retire(ctx, t, st, g); err != nil {
		return err
	}
	first := t.drop(st.table, st.chain(g))
	if first == nil {
		return nil
	}
	// The usual cause of the failure is a jump from a chain other than the hook. Finding that jump requires a complete
	// dump, which is slow on a node with many rules, so the dump is made only after a failure.
	d, err := t.dump(ctx)
	if err != nil {
		return errors.Join(first, err)
	}
	if err := removeReferences(t, d, st.table, st.chain(g)); err != nil {
		return errors.Join(first, err)
	}
	return t.drop(st.table, st.chain(g))
}

func removeReferences(t tables, d dump, table, chain string) error {
	for _, rule := range d.rules[table] {
		if rule.target() != chain {
			continue
		}
		if err := t.remove(table, rule.chain, rule.args); err != nil {
			return err
		}
	}
	return nil
}

// purge removes a slot from one back end: for each generation first its rules, then the jumps to it, then the chain.
// Missing chains are no error, because the aim is that they do not exist. purge works on a dump, which unlike a listing
// does not create tables on the node.
func purge(ctx context.Context, t tables, d dump, s slot) error {
	var foreign error
	for g := range generations {
		if err := ctx.Err(); err != nil {
			return err
		}
		chain := s.chain(g)
		if !slices.Contains(d.chains[s.table], chain) {
			continue
		}
		var rules, jumps []listed
		for _, rule := range d.rules[s.table] {
			if rule.chain == chain {
				rules = append(rules, rule)
			}
			if rule.target() == chain {
				jumps = append(jumps, rule)
			}
		}
		if isForeign(rules, jumps) {
			foreign = foreignChain(s.table, chain)
			continue
		}
		if err := t.empty(s.table, chain); err != nil { // Before the jumps, see retire.
			return err
		}
		if err := removeReferences(t, d, s.table, chain); err != nil {
			return err
		}
		if err := t.drop(s.table, chain); err != nil {
			return err
		}
	}
	return foreign
}
