-- True; an error while values are hidden, because the stored counts of their parts still count them.
--
-- Grain:   scalar.
-- Reads:   src_hidden_values
-- Units:   nothing
-- Ask it:  select no_value_is_hidden()
create or replace macro no_value_is_hidden() as
case
    when not exists (from src_hidden_values) then true
    else error('values are hidden since a document was forgotten or replaced: saeflow encode RECIPE shows them again')
end;
