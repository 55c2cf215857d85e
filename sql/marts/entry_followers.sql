-- What follows a vocabulary entry in the corpus, and which features on the entry push that up or down, under a filter.
--
-- Grain:   one row per vocabulary entry that follows inside a document, the commonest first; at most n.
-- Reads:   under_filter_of_entry, token_owners, token_pieces, stg_token_major, is_beyond, stg_logits
-- Units:   n_tokens counts the entry's tokens that the follower comes after, among those that entry_features counts;
--          share is their share of all that something comes after. A feature's push is value * logit, averaged over
--          the n_tokens: what it adds on average to the follower's logit where the follower comes next (a feature that
--          is silent adds 0). features are the 5 with the largest magnitude of push, pushes theirs, n_fired the tokens
--          at which they fire. Only the 20 entries that a feature pushes up most and the 20 that it pushes down most
--          are stored, so weaker pushes are missing. The filter is that of feature_numbers.
-- Parameters: vocab bigint, n bigint = 20, source text = null, document_key text = null, since text = null,
--          until text = null, role text = null, threshold double = 0, with_feature bigint = null,
--          without_feature bigint = null
-- Ask it:  what comes after this word, and who says so?  from entry_followers(4711)
create or replace macro entry_followers(
    vocab,
    n := 20,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with entry as materialized (
    from under_filter_of_entry(vocab, source, document_key, since, until, role, with_feature, without_feature)
),
ends as (
    select token_id, end_token_id from token_owners((select list(token_id) from entry))
),
followed as materialized (
    select ends.token_id, pieces.vocab_id, pieces.piece
    from ends
    join token_pieces((select list(token_id + 1) from entry)) as pieces on pieces.token_id = ends.token_id + 1
    where ends.token_id + 1 < end_token_id
),
followers as materialized (
    select vocab_id, any_value(piece) as piece, count(*) as n_tokens, count(*) / sum(count(*)) over () as share
    from followed
    group by vocab_id
    order by n_tokens desc, vocab_id
    limit n
),
pushes as (
    select
        followed.vocab_id,
        feature_id,
        count(*)                                             as n_fired,
        sum(fired.value::double * logits.logit) / any_value(followers.n_tokens) as push
    from followed
    join followers using (vocab_id)
    join (
        select token_id, feature_id, value
        from stg_token_major
        where token_id in (select token_id from followed)
            and case when coalesce(threshold, 0) = 0 then true else is_beyond(value, threshold::double) end
    ) as fired using (token_id)
    join stg_logits as logits using (feature_id, vocab_id)
    group by followed.vocab_id, feature_id
),
strongest as (
    select
        vocab_id,
        list(feature_id order by abs(push) desc, feature_id)[1:5] as features,
        list(push order by abs(push) desc, feature_id)[1:5]       as pushes,
        list(n_fired order by abs(push) desc, feature_id)[1:5]    as n_fired
    from pushes
    group by vocab_id
)
select
    vocab_id,
    followers.piece,
    followers.n_tokens,
    share,
    coalesce(features, []) as features,
    coalesce(pushes, [])   as pushes,
    coalesce(n_fired, [])  as n_fired
from followers
left join strongest using (vocab_id)
order by followers.n_tokens desc, vocab_id;
