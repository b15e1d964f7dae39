package azure

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"
)

// identityPatch is the identity part of the body of a PATCH.
type identityPatch struct {
	given        bool              // the body has an identity part
	text         string            // identity.type as sent
	system, user bool              // whether the type contains SystemAssigned and UserAssigned
	add          map[string]string // folded ID -> ID as sent
	remove       []string          // folded, sorted
	malformed    []string          // keys that are not IDs of user-assigned identities
	failure      *armError
}

// parsePatch parses the body of a PATCH. For an invalid body, it sets malformed or
// failure, and also returns what it can parse, for the log.
func parsePatch(body []byte) identityPatch {
	p := identityPatch{add: map[string]string{}}
	var doc struct {
		Identity *struct {
			Type                   *string                    `json:"type"`
			UserAssignedIdentities map[string]json.RawMessage `json:"userAssignedIdentities"`
		} `json:"identity"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		p.failure = refusedBody("The request content was invalid and could not be deserialized: '" + err.Error() + "'.")
		return p
	}
	if doc.Identity == nil {
		return p
	}
	p.given = true
	seen := map[string]bool{}
	for _, asSent := range slices.Sorted(maps.Keys(doc.Identity.UserAssignedIdentities)) {
		key, value := FoldID(asSent), doc.Identity.UserAssignedIdentities[asSent]
		switch {
		case !userAssignedForm.MatchString(asSent):
			p.malformed = append(p.malformed, asSent)
		case seen[key]:
			p.failure = refusedBody("The identity '" + asSent + "' is specified more than once, in different case.")
		case string(value) == "null":
			p.remove = append(p.remove, key)
		case value[0] == '{':
			p.add[key] = asSent
		default:
			p.failure = refusedBody("The value of userAssignedIdentities['" + asSent + "'] is neither an object nor null.")
		}
		seen[key] = true
	}
	slices.Sort(p.remove)
	if doc.Identity.Type != nil {
		p.text = *doc.Identity.Type
	}
	if err := p.parseType(); p.failure == nil {
		p.failure = err
	}
	return p
}

func refusedBody(message string) *armError {
	return &armError{Status: http.StatusBadRequest, Code: "InvalidRequestContent", Message: message}
}

// parseType parses the type: "None", or one or both of SystemAssigned and
// UserAssigned in any order. It returns an error for any other type, and for a
// body that has user-assigned identities but not the type UserAssigned.
func (p *identityPatch) parseType() *armError {
	for word := range strings.SplitSeq(p.text, ",") {
		switch word := strings.TrimSpace(word); {
		case strings.EqualFold(word, "SystemAssigned"):
			p.system = true
		case strings.EqualFold(word, "UserAssigned"):
			p.user = true
		case strings.EqualFold(p.text, "None"):
		default:
			return invalidParameter("identity.type", "The value '"+p.text+"' of parameter identity.type is invalid. "+
				"It must be None, SystemAssigned, UserAssigned or 'SystemAssigned, UserAssigned'.")
		}
	}
	if !p.user && len(p.add)+len(p.remove) > 0 {
		return invalidParameter("identity.userAssignedIdentities",
			"The property userAssignedIdentities must be empty when the type is '"+p.text+"'.")
	}
	return nil
}

func invalidParameter(target, message string) *armError {
	return &armError{Status: http.StatusBadRequest, Code: "InvalidParameter", Target: target, Message: message}
}

// patch accepts a PATCH or refuses it. It checks the body, then everything else in the
// order of the real Azure: Resource Manager checks the linked resources (here
// patchCheck.linked), then the compute provider checks the rest (here patchCheck.state
// and patchCheck.missing).
func (a *ARM) patch(x *armRequestContext, m *armMachine) response {
	p := x.patch
	if len(p.malformed) > 0 {
		return x.refuse(&armError{Status: http.StatusBadRequest, Code: "LinkedInvalidPropertyId", Message: "Property id '" + p.malformed[0] +
			"' at path 'identity.userAssignedIdentities' is invalid. Expect fully qualified resource Id that start with" +
			" '/subscriptions/{subscriptionId}' or '/providers/{resourceProviderNamespace}/'."})
	}
	if p.failure != nil {
		return x.refuse(p.failure)
	}
	check := patchCheck{a.armState, a.armFaults, x, m}
	if err := check.linked(); err != nil {
		return x.refuse(err)
	}
	if err := check.state(); err != nil {
		return x.refuse(err)
	}
	failure, apply := check.missing(), false
	if failure != nil && !a.settings.LateErrors {
		return x.refuse(failure)
	}
	if f := x.fault; f != nil && f.Fails {
		failure, apply = f.operationError(), f.Apply
	}
	o := a.begin(m, p, failure, apply)
	x.entry.Accepted, x.entry.OperationID, x.entry.Start, x.entry.End = true, o.id, o.start, o.end
	out := a.describe(m)
	if !o.ended {
		out.header["Azure-AsyncOperation"] = x.base() + "/subscriptions/" + m.subscription + "/providers/Microsoft.Compute/locations/" +
			a.o.Location + "/operations/" + o.id + "?api-version=" + x.version
		a.settings.addRetryAfter(out)
	}
	return out
}

// patchCheck has the checks of one PATCH that need more than the body of the PATCH.
type patchCheck struct {
	*armState
	faults *armFaults
	x      *armRequestContext
	m      *armMachine
}

// linked checks whether the caller may assign the identities that the PATCH adds.
func (c patchCheck) linked() *armError {
	x, m := c.x, c.m
	var named []string
	denied, details := false, false
	for _, key := range slices.Sorted(maps.Keys(x.patch.add)) {
		bad := c.faults.ofIdentity(key)
		if !bad.Denied {
			continue
		}
		denied = true
		naming := bad.naming(c.settings)
		details = details || naming == NamedInDetails
		if naming != Unnamed {
			named = append(named, x.patch.add[key])
		}
	}
	if !denied {
		return nil
	}
	scopes := "the linked scope(s)"
	if named != nil {
		scopes += " '" + strings.Join(named, ",") + "'"
	}
	err := &armError{Status: http.StatusForbidden, Code: "LinkedAuthorizationFailed", Message: "The client '" + x.claims.AppID +
		"' with object id '" + x.claims.ObjectID + "' has permission to perform action 'Microsoft.Compute/" + m.resourceType +
		"/write' on scope '" + m.id + "'; however, it does not have permission to perform action" +
		" 'Microsoft.ManagedIdentity/userAssignedIdentities/assign/action' on " + scopes + " or the linked scope(s) are invalid."}
	if details {
		for _, id := range named {
			err.Details = append(err.Details, armError{Code: "LinkedAuthorizationFailed", Target: id,
				Message: "The client does not have permission to perform action 'Microsoft.ManagedIdentity/userAssignedIdentities/assign/action'."})
		}
	}
	return err
}

// state checks whether the machine accepts the PATCH in its current state.
func (c patchCheck) state() *armError {
	x, m := c.x, c.m
	what := "Virtual Machine"
	if m.kind == KindVMSS {
		what = "Virtual Machine Scale Set"
	}
	if strings.EqualFold(m.forced, stateDeleting) {
		return &armError{Status: http.StatusConflict, Code: "OperationNotAllowed", Message: "Operation 'Update " + what +
			"' is not allowed on " + what + " '" + m.name + "' since it is marked for deletion."}
	}
	want := x.entry.IfMatch
	if want != "" && want != "*" && !c.settings.NoETags && strings.Trim(want, `"`) != strings.Trim(m.etag(), `"`) {
		return &armError{Status: http.StatusPreconditionFailed, Code: "PreconditionFailed",
			Message: "Etag provided in if-match header " + want + " does not match etag " + m.etag() + " of resource."}
	}
	busy := len(m.operations) > 0 || strings.EqualFold(m.forced, stateUpdating) || strings.EqualFold(m.forced, stateCreating)
	if busy && !c.settings.Queue {
		return &armError{Status: http.StatusConflict, Code: "Conflict", Message: "The request failed due to conflict with a concurrent request. " +
			"To resolve it, please refer to https://aka.ms/activitylog to get more details on the conflicting requests."}
	}
	if x.patch.user && c.leavesNothing() {
		return &armError{Status: http.StatusBadRequest, Code: "MissingIdentityIds",
			Message: "The identity ids must not be null or empty for '" + x.patch.text + "' identity type."}
	}
	return nil
}

// leavesNothing reports whether the machine would have no user-assigned identity
// after the PATCH. It counts added identities that do not exist as attached, because
// missing returns the error for them.
func (c patchCheck) leavesNothing() bool {
	left, p := maps.Clone(c.m.projected().user), c.x.patch
	for _, key := range p.remove {
		delete(left, key)
	}
	return len(left)+len(p.add) == 0
}

// missing returns the error of a PATCH with non-existing identities, or nil.
func (c patchCheck) missing() *armError {
	m, p := c.m, c.x.patch
	if !p.user {
		return nil
	}
	asSent := maps.Clone(p.add)
	if c.settings.Dangling {
		for key, at := range m.projected().user {
			if !slices.Contains(p.remove, key) {
				asSent[key] = at.asSent
			}
		}
	}
	var inText, inDetails []string
	gone := false
	for _, key := range slices.Sorted(maps.Keys(asSent)) {
		_, exists := c.identities[key]
		bad := c.faults.ofIdentity(key)
		if exists && !bad.Missing {
			continue
		}
		gone = true
		naming := bad.naming(c.settings)
		if naming != Unnamed {
			inText = append(inText, asSent[key])
		}
		if naming == NamedInDetails {
			inDetails = append(inDetails, asSent[key])
		}
	}
	if !gone {
		return nil
	}
	return missingError(m, inText, inDetails)
}

// missingError returns an error in Azure's format: the compute provider's message
// contains the error of the identity provider, which names at most one identity.
func missingError(m *armMachine, inText, inDetails []string) *armError {
	because := "Bad request."
	if len(inText) > 0 {
		because = "Resource '" + inText[0] + "' was not found."
	}
	inner := encode(map[string]any{"error": map[string]string{"code": "BadRequest", "message": because}})
	err := &armError{Status: http.StatusBadRequest, Code: "FailedIdentityOperation", Message: "Identity operation for resource '" + m.id +
		"' failed with error 'Failed to perform resource identity operation. Status: 'BadRequest'. Response: '" + string(inner) + "'.'."}
	for _, id := range inDetails {
		err.Details = append(err.Details, armError{Code: "BadRequest", Target: id, Message: "Resource '" + id + "' was not found."})
	}
	return err
}
