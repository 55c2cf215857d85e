-- What the model did when single firings of features were changed.
--
-- Grain:   one row per (effect, feature, token, ahead).
-- Reads:   src_effects, src_hidden (firings in forgotten and replaced documents are left out)
-- Units:   effect is the name that `saeflow effects` gave to the table, change what was done: zero, mean, max*2, same,
--          or a number. The feature had `value` at token_id and was set to set_to there, and nowhere else. ahead counts
--          the tokens from there to the prediction: 0 is the prediction at the token itself. loss is the model's,
--          before, in nats, and loss_change what was added to it (null where no token of the document follows). kl is
--          KL(before ‖ after) in nats. The entries up_ids gained most probability, and down_ids lost most: the most
--          first, with their probabilities before and after. band is the quantile band, 1 the strongest.
-- Ask it:  from stg_effects where feature_id = 12
create or replace view stg_effects as
select * from src_effects
anti join src_hidden using (document_id);
